"""A scheduler's steps as small matrices, found by running it on basis inputs.

Most deterministic schedulers are linear: latents x_{k+1} is a weighted sum of the first latents x_0
and of the noise predictions ε_0 … ε_k, with weights that depend on the schedule alone. So one pass
of the scheduler's own loop over unit inputs tells every weight. What a scheduler remembers between
steps (converted predictions, corrected latents) need not be known: the weights of later latents
over earlier inputs span exactly what has to be remembered. The smallest such memory, step by step,
is the realisation of a linear system from its responses (Ho and Kalman, 1966; for systems that
change with time: Dewilde and van der Veen, "Time-Varying Systems and Computations", 1998).
"""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from ..errors import SchedulerError
from .scheduler import check_scheduler

#: Most tensors of the latents' size that a sampler may carry from step to step, latents included.
MAX_WIDTH = 8
#: Relative error, in float64, above which a scheduler does not count as linear.
TOLERANCE = 1e-6

#: How many later latents are looked at to see what must be remembered.
_WINDOW = 16
#: Below this share of the largest weight, a direction is rounding.
_RANK_TOLERANCE = 1e-10

Predict = Callable[[int, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class LinearSampler:
    """A schedule of T steps as arithmetic on a state of ``width`` tensors like the latents.

    The state's first tensor is the latents x_k; the others start as zeros. Step k feeds the
    denoiser ``scales[k] * x_k``, gets ε_k, and makes state' = ``steps[k]`` @ (state…, ε_k).

    ``timesteps``: T values, as the scheduler has them. ``scales``: float64, T. ``steps``: float64,
    T × width × (width + 1). ``error``: how far this lay from the scheduler's own loop on random
    inputs, in float64, relative to the largest latents.
    """

    scheduler: str
    timesteps: torch.Tensor
    scales: torch.Tensor
    steps: torch.Tensor
    error: float

    @property
    def width(self) -> int:
        """Tensors in the state: 1 for DDIM or Euler, 2 for DPM-Solver++ 2M."""
        return self.steps.shape[1]

    def run(self, latents: torch.Tensor, predict: Predict) -> list[torch.Tensor]:
        """x_0 … x_T in the latents' dtype; ``predict(k, input)`` returns ε_k."""
        state = torch.zeros(self.width, *latents.shape, dtype=latents.dtype, device=latents.device)
        state[0] = latents
        path = [latents]
        for k in range(len(self.scales)):
            scale, step = self.scales[k].to(state), self.steps[k].to(state)
            inputs = torch.cat([state, predict(k, scale * state[0])[None]])
            state = torch.tensordot(step, inputs, dims=1)
            path.append(state[0])
        return path


def linearize(
    scheduler: Any,
    timesteps: torch.Tensor | None = None,
    options: Mapping[str, Any] | None = None,
) -> LinearSampler:
    """The steps of a diffusers scheduler whose ``set_timesteps`` has just been called.

    ``timesteps``: those that will be stepped through, if not all; ``options``: further arguments of
    its ``step`` (``eta``). The scheduler itself is left as it is.

    Raises SchedulerError, with the reason, for one that is not linear (clipping, thresholding),
    that draws noise, that calls the denoiser more than once a step, that needs more than a
    prediction, a timestep and latents, or that remembers too much.
    """
    name = type(scheduler).__name__
    times = check_scheduler(scheduler) if timesteps is None else timesteps
    check_scheduler(scheduler)
    known = {k: v for k, v in (options or {}).items() if k != "generator"}
    weights, scales = _weights(scheduler, times, known)
    steps = realise(weights, name)
    sampler = LinearSampler(name, times, scales, steps, 0.0)
    error = _check(scheduler, sampler, known)
    return LinearSampler(name, times, scales, steps, error)


class Samplers:
    """Remembers what :func:`linearize` found, which takes a few ms a step to find."""

    def __init__(self, kept: int = 8) -> None:
        self._kept = kept
        self._found: OrderedDict[Hashable, LinearSampler | SchedulerError] = OrderedDict()

    def get(self, scheduler: Any, options: Mapping[str, Any] | None = None) -> LinearSampler:
        """:func:`linearize`, or its answer to the same scheduler, settings and timesteps."""
        key = _fingerprint(scheduler, options or {})
        if key not in self._found:
            while len(self._found) >= self._kept:
                self._found.popitem(last=False)
            try:
                self._found[key] = linearize(scheduler, options=options)
            except SchedulerError as e:
                self._found[key] = e
        self._found.move_to_end(key)
        found = self._found[key]
        if isinstance(found, SchedulerError):
            raise SchedulerError(str(found))
        return found


def _fingerprint(scheduler: Any, options: Mapping[str, Any]) -> Hashable:
    parts: list[Hashable] = [type(scheduler).__qualname__]
    for name, value in sorted([*vars(scheduler).items(), *options.items()]):
        if isinstance(value, torch.Tensor | np.ndarray):
            array = value.cpu().numpy() if isinstance(value, torch.Tensor) else value
            parts.append((name, str(array.dtype), array.tobytes()))
        else:
            parts.append((name, repr(value)))
    return tuple(parts)


# ---- the scheduler's own loop --------------------------------------------------------------------


class _InDouble(TorchFunctionMode):
    """Lets schedulers that compute in float32 do it in float64: weights without rounding."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in (torch.Tensor.to, torch.Tensor.float, torch.Tensor.type):
            return result
        value = args[0]
        narrowed = value.dtype is torch.float64 and value.dim() > 0
        return value if narrowed and result.dtype is torch.float32 else result


def _own_loop(
    scheduler: Any,
    times: torch.Tensor,
    latents: torch.Tensor,
    predictions: Callable[[int], torch.Tensor],
    options: Mapping[str, Any],
    seed: int = 0,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """x_0 … x_T and the denoiser's inputs of T steps, in float64 on the CPU."""
    twin = _on_cpu(copy.deepcopy(scheduler))
    scale = getattr(twin, "scale_model_input", lambda x, t: x)
    path, inputs = [latents], []
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), _InDouble():
            torch.manual_seed(seed)
            for k, t in enumerate(times.cpu()):
                inputs.append(scale(path[-1].clone(), t).clone())
                out = twin.step(predictions(k), t, path[-1].clone(), **options, return_dict=False)
                path.append(out[0].to(torch.float64).clone())
                if path[-1].shape != latents.shape:
                    raise ValueError(f"step() made {tuple(path[-1].shape)} of latents")
    except Exception as e:  # whatever a scheduler of another kind makes of such inputs
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise SchedulerError(
            f"{type(scheduler).__name__} does not step with a prediction, a timestep and latents "
            f"alone ({reason}): run your own loop around the denoiser"
        ) from e
    return path, inputs


def _on_cpu(scheduler: Any) -> Any:
    for name, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor):
            setattr(scheduler, name, value.cpu())
    return scheduler


def _weights(
    scheduler: Any, times: torch.Tensor, options: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row k: the weights of x_k over (x_0, ε_0 … ε_{T−1}). And the scales of the inputs."""
    steps = len(times)
    # Schedulers work element by element: a tensor whose i-th element is 1 in the i-th input, and 0
    # in all others, carries all unit inputs through one loop.
    unit = torch.eye(steps + 1, dtype=torch.float64).view(-1, 1, 1, 1, steps + 1)
    path, inputs = _own_loop(scheduler, times, unit[0], lambda k: unit[k + 1].clone(), options)
    scales = [
        (i * x).sum() / (x * x).sum().clamp_min(1e-300)
        for i, x in zip(inputs, path[:-1], strict=True)
    ]
    return torch.stack([x.flatten() for x in path]), torch.stack(scales)


# ---- from weights to steps -----------------------------------------------------------------------


def realise(weights: torch.Tensor, name: str) -> torch.Tensor:
    """Steps with the least memory that give these weights: T × width × (width + 1)."""
    if not bool(weights.isfinite().all()):
        raise SchedulerError(
            f"{name} makes infinite or undefined numbers with these settings and timesteps: try "
            "others (final_sigmas_type='sigma_min', for example)"
        )
    states = [_state(weights, k) for k in range(len(weights))]
    width = max(len(s) for s in states)
    if width > MAX_WIDTH:
        raise SchedulerError(
            f"{name} needs {width} tensors of the latents' size from step to step, more than "
            f"{MAX_WIDTH}: its own step() has to be called"
        )
    steps = torch.zeros(len(states) - 1, width, width + 1, dtype=torch.float64)
    for k, (now, then) in enumerate(itertools.pairwise(states)):
        # The rows of ``now`` are orthogonal, so that projecting on them solves for the weights.
        norms = (now * now).sum(1).clamp_min(1e-300)
        steps[k, : len(then), : len(now)] = then[:, : k + 1] @ now.T / norms
        steps[k, : len(then), width] = then[:, k + 1]
    return steps


def _state(weights: torch.Tensor, k: int) -> torch.Tensor:
    """What must be known before step k, as orthogonal rows over the inputs so far: x_k first."""
    now = weights[k, : k + 1]
    later = weights[k + 1 : k + 1 + _WINDOW, : k + 1]
    if len(later) == 0:
        return now[None]
    rest = later - torch.outer(later @ now / (now @ now).clamp_min(1e-300), now)
    _, values, rows = torch.linalg.svd(rest, full_matrices=False)
    scale = max(float(weights[k : k + 1 + _WINDOW].norm(dim=1).max()), 1e-300)
    return torch.cat([now[None], rows[values > _RANK_TOLERANCE * scale]])


def _check(scheduler: Any, sampler: LinearSampler, options: Mapping[str, Any]) -> float:
    """The largest relative error on random inputs; raises SchedulerError above the tolerance."""
    name, times = sampler.scheduler, sampler.timesteps
    worst = 0.0
    for size in (1.0, 10.0):  # the second finds clipping at larger values
        g = torch.Generator().manual_seed(len(times))
        draw = torch.randn(len(times) + 1, 1, 4, 6, 5, generator=g, dtype=torch.float64) * size

        def predictions(k: int, draw: torch.Tensor = draw) -> torch.Tensor:
            return draw[k + 1].clone()

        own, inputs = _own_loop(scheduler, times, draw[0], predictions, options, seed=1)
        other, _ = _own_loop(scheduler, times, draw[0], predictions, options, seed=2)
        if any(not torch.equal(a, b) for a, b in zip(own, other, strict=True)):
            raise SchedulerError(
                f"{name} is stochastic: it draws noise in its steps, so its own step() has to be "
                "called"
            )
        path = sampler.run(draw[0], lambda k, x, draw=draw: draw[k + 1])  # type: ignore[misc]
        scaled = [s * x for s, x in zip(sampler.scales, path[:-1], strict=True)]
        for mine, theirs in ((path, own), (scaled, inputs)):
            got, want = torch.stack(mine), torch.stack(theirs)
            error = float((got - want).abs().max() / want.abs().max())
            worst = max(worst, error if error == error else float("inf"))
        if worst > TOLERANCE:
            raise SchedulerError(
                f"{name} is not linear in latents and noise predictions (off by {worst:.1e} on "
                "random inputs; does it clip or threshold?): its own step() has to be called"
            )
    return worst
