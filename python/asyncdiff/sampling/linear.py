"""A scheduler's steps as weights, found by running it on basis inputs.

Most deterministic schedulers are linear: latents x_{k+1} is a weighted sum of the first latents x_0
and of the noise predictions ε_0 … ε_k, with weights that depend on the schedule alone. So one pass
of the scheduler's own loop over unit inputs tells every weight, whatever the scheduler remembers
between steps.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..errors import SchedulerError
from .scheduler import check_order, check_scheduler

#: Relative error, in float64, above which a scheduler does not count as linear.
TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class LinearSampler:
    """A schedule of T steps as weighted sums of what goes into it.

    Step k feeds the denoiser ``scales[k] * x_k`` and gets ε_k. Row k of ``weights`` has those of
    x_k over (x_0, ε_0 … ε_{T−1}).

    ``timesteps``: T values, as the scheduler has them. ``scales``: float64, T. ``weights``:
    float64, (T + 1) × (T + 1), zero above the diagonal. ``error``: how far this lay from the
    scheduler's own loop on random inputs, in float64, relative to the largest latents.
    """

    timesteps: torch.Tensor
    scales: torch.Tensor
    weights: torch.Tensor
    error: float

    def latents(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """x_k from x_0, ε_0 … ε_{k−1}: of any shape, in their dtype, summed in float64."""
        x = torch.zeros_like(inputs[0], dtype=torch.float64)
        row = self.weights[len(inputs) - 1, : len(inputs)]
        for weight, value in zip(row.tolist(), inputs, strict=True):
            x.add_(value, alpha=weight)
        return x.to(inputs[0].dtype)


def linearize(
    scheduler: Any,
    timesteps: torch.Tensor | None = None,
    options: Mapping[str, Any] | None = None,
) -> LinearSampler:
    """The steps of a diffusers scheduler whose ``set_timesteps`` has just been called.

    ``timesteps``: those that will be stepped through, if not all; ``options``: further arguments of
    its ``step`` (``eta``). The scheduler itself is left as it is.

    Raises SchedulerError, with the reason, for one that is not linear (clipping, thresholding),
    that draws noise, that calls the denoiser more than once a step, or that needs more than a
    prediction, a timestep and latents.
    """
    own = check_scheduler(scheduler)
    check_order(scheduler)
    times = own if timesteps is None else timesteps
    known = {k: v for k, v in (options or {}).items() if k != "generator"}
    # Schedulers work element by element: a tensor whose i-th element is 1 in the i-th input, and 0
    # in all others, carries all unit inputs through one loop.
    unit = torch.eye(len(times) + 1, dtype=torch.float64).view(-1, 1, 1, 1, len(times) + 1)
    path, inputs = _own_loop(scheduler, times, unit, known)
    weights = path.flatten(1)
    if not bool(weights.isfinite().all()):
        raise SchedulerError(
            f"{type(scheduler).__name__} makes infinite or undefined numbers with these settings "
            "and timesteps: try others (final_sigmas_type='sigma_min', for example)"
        )
    before, given = weights[:-1], inputs.flatten(1)
    scales = (given * before).sum(1) / before.square().sum(1).clamp_min(1e-300)
    sampler = LinearSampler(times, scales, weights, 0.0)
    return replace(sampler, error=_check(scheduler, sampler, known))


#: Functions that draw, by which a scheduler makes noise.
_DRAWING = {
    torch.rand, torch.rand_like, torch.randint, torch.randn, torch.randn_like, torch.normal,
    torch.multinomial, torch.bernoulli, torch.Tensor.uniform_, torch.Tensor.normal_,
}  # fmt: skip


class _Measured(TorchFunctionMode):
    """Lets schedulers that compute in float32 do it in float64, which gives weights without
    rounding, and draw from a generator of their own: torch's is the user's, in all threads."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWING and kwargs.get("generator") is None:
            kwargs["generator"] = self._generator
        result = func(*args, **kwargs)
        if func not in (torch.Tensor.to, torch.Tensor.float, torch.Tensor.type):
            return result
        value = args[0]
        narrowed = value.dtype is torch.float64 and value.dim() > 0
        return value if narrowed and result.dtype is torch.float32 else result


def _own_loop(
    scheduler: Any,
    times: torch.Tensor,
    given: torch.Tensor,
    options: Mapping[str, Any],
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_0 … x_T and the denoiser's inputs of T steps, stacked, in float64 on the CPU.

    ``given``: x_0, ε_0 … ε_{T−1}.
    """
    twin = copy.deepcopy(scheduler)
    for name, value in vars(twin).items():
        if isinstance(value, torch.Tensor):
            setattr(twin, name, value.cpu())
    scale = getattr(twin, "scale_model_input", lambda x, t: x)
    path, inputs = [given[0]], []
    try:
        with torch.no_grad(), _Measured(seed):
            for t, prediction in zip(times.cpu(), given[1:], strict=True):
                inputs.append(scale(path[-1].clone(), t).clone())
                out = twin.step(
                    prediction.clone(), t, path[-1].clone(), **options, return_dict=False
                )
                path.append(out[0].to(torch.float64).clone())
                if path[-1].shape != given[0].shape:
                    raise ValueError(f"step() made {tuple(path[-1].shape)} of latents")
    except Exception as e:  # whatever a scheduler of another kind makes of such inputs
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise SchedulerError(
            f"{type(scheduler).__name__} does not step with a prediction, a timestep and latents "
            f"alone ({reason})"
        ) from e
    return torch.stack(path), torch.stack(inputs)


def _check(scheduler: Any, sampler: LinearSampler, options: Mapping[str, Any]) -> float:
    """The largest relative error on random inputs; raises SchedulerError above the tolerance."""
    name, times = type(scheduler).__name__, sampler.timesteps
    worst = 0.0
    for size in (1.0, 10.0):  # the second finds clipping at larger values
        g = torch.Generator().manual_seed(len(times))
        draw = torch.randn(len(times) + 1, 1, 4, 6, 5, generator=g, dtype=torch.float64) * size
        own, inputs = _own_loop(scheduler, times, draw, options, seed=1)
        if not torch.equal(own, _own_loop(scheduler, times, draw, options, seed=2)[0]):
            raise SchedulerError(
                f"{name} is stochastic: with these settings it draws noise in its steps"
            )
        path = torch.tensordot(sampler.weights, draw, 1)
        scaled = sampler.scales.view(-1, 1, 1, 1, 1) * path[:-1]
        for got, want in ((path, own), (scaled, inputs)):
            error = float((got - want).abs().max() / want.abs().max())
            worst = max(worst, error if error == error else float("inf"))
        if worst > TOLERANCE:
            raise SchedulerError(
                f"{name} is not linear in latents and noise predictions (off by {worst:.1e} on "
                "random inputs; does it clip or threshold?)"
            )
    return worst
