"""How a sampler's latents answer to predictions, and by how much it was misled.

Steps are linear (:mod:`asyncdiff.sampling.linear`): latents x_m is a weighted sum of the first ones
and of the predictions before it, with weights that say all that a sampler makes of a prediction,
also what a multistep one makes of it in later steps. So when it is known what a step should have
been given, it is known by how much every later x_m is off.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import SchedulerError
from .linear import linearize

#: The steps in which a multistep sampler may use a prediction directly, at the most.
_MEMORY = 6
#: Weights that agree so closely are alike.
_ALIKE = 1e-4
#: Where they still differ by so much, a sampler goes back to latents of much earlier steps.
_UNLIKE = 0.2
#: A prediction with at least this share of the weight of a step's own is used there.
_USED = 0.05
#: Responses that are kept: of one model there are few.
_KEPT = 32


@dataclass(frozen=True)
class Response:
    """Row m of ``weights`` has those of latents x_m over the predictions of steps 0 … T−1, and
    ``start[m]`` is that of x_0. From ``memory`` steps after it on, a prediction is felt only in
    the latents, which carry it on in proportion to ``start``. ``remembered``: how many predictions
    before its own a step uses, where these count for more than its own does: of Adams-Bashforth's
    fourth order, as PNDM and LMS are, three; 0 where they count for less. There a step gets more
    than it is owed to be paid back, which misleads as many steps after it."""

    weights: tuple[tuple[float, ...], ...]
    start: tuple[float, ...]
    memory: int
    #: what the first latents are multiplied by for the denoiser
    scale: float
    remembered: int = 0

    def of_steps(self, start: int, steps: int) -> Response:
        """The same of ``steps`` steps from ``start`` on."""
        end = start + steps
        rows = tuple(row[start:end] for row in self.weights[start : end + 1])
        return replace(self, weights=rows, start=self.start[start : end + 1])


def respond(scheduler: Any, start: int = 0, options: Mapping[str, Any] | None = None) -> Response:
    """How a scheduler's steps from ``start`` on respond, when none of them was taken yet.
    ``options``: further arguments of its ``step``.

    Raises SchedulerError for one that is not linear: that draws noise, or clips clean images. What
    is beyond bounds can neither be weighed nor paid back, and a little error there is amplified:
    DDIM clips the clean image of a prediction, but not its noise.
    """
    times = scheduler.timesteps[start:]
    key = (
        type(scheduler), repr(dict(scheduler.config)), tuple(times.tolist()), repr(options),
        tuple(getattr(scheduler, "sigmas", times).tolist()), getattr(scheduler, "step_index", None),
    )  # fmt: skip
    if key not in _known:
        if len(_known) >= _KEPT:
            _known.clear()
        try:
            _known[key] = _measure(scheduler, times, options)
        except SchedulerError as e:
            _known[key] = str(e)
    known = _known[key]
    if isinstance(known, str):
        raise SchedulerError(known)
    return known


#: By scheduler, its configuration, timesteps and options: its response, or what is wrong with it.
_known: dict[Any, Response | str] = {}


def _measure(scheduler: Any, times: torch.Tensor, options: Mapping[str, Any] | None) -> Response:
    sampler = linearize(scheduler, times, options)
    hint = " (as PNDM does in Runge-Kutta steps: take skip_prk_steps=True)"
    return response_of(sampler.weights, float(sampler.scales[0]), type(scheduler).__name__, hint)


def response_of(every: torch.Tensor, scale: float, name: str, hint: str = "") -> Response:
    """The response of a sampler with this ``name``, of which row m of ``every``, of shape
    (T+1, T+1), has the weights of latents x_m over x_0 and the predictions of steps 0 … T−1;
    ``scale`` is what x_0 is multiplied by for the denoiser. Raises SchedulerError for one that goes
    back to latents of much earlier steps; ``hint`` says what to do."""
    start, weights = every[:, 0], every[:, 1:]
    memory = 1
    while memory < _MEMORY and not _carried(weights, start, memory, _ALIKE):
        memory += 1
    if not _carried(weights, start, memory, _UNLIKE):
        raise SchedulerError(f"{name} goes back to latents of much earlier steps{hint}")
    rows = tuple(tuple(row) for row in weights.tolist())
    first = tuple(start.tolist())
    return Response(rows, first, memory, scale, _remembered(rows, first))


def _remembered(weights: Sequence[Sequence[float]], start: Sequence[float]) -> int:
    """See :class:`Response`: in the second half, where samplers have the order that they are of."""
    most, steps = 0, len(start) - 1
    for k in range(steps // 2, steps):
        if not start[k]:
            continue
        carried = start[k + 1] / start[k]
        new, old = weights[k + 1], weights[k]
        own, *earlier = (abs(new[j] - carried * old[j]) for j in range(k, -1, -1))
        if sum(earlier) > own:
            most = max(most, sum(weight > _USED * own for weight in earlier))
    return min(most, _MEMORY - 1)


def _carried(weights: torch.Tensor, start: torch.Tensor, memory: int, apart: float) -> bool:
    """Whether all weights are in proportion to ``start`` from so many steps on, but for so much."""
    for j in range(weights.shape[1] - memory):
        felt, carried = weights[j + memory :, j], start[j + memory :]
        if not carried[0] or (felt - felt[0] * carried / carried[0]).abs().max() > apart * float(
            weights[:, j].abs().max()
        ):
            return False
    return True


class Owed:
    """What the sampler is owed: by how much latents would differ if it had been given what is known
    by now. Errors are those of predictions, of any shape, and learnt in ascending order."""

    def __init__(self, response: Response) -> None:
        self._response = response
        #: of the last few steps, and what older ones amount to, over ``start``
        self._recent: dict[int, torch.Tensor] = {}
        self._carried: torch.Tensor | None = None

    def learn(self, step: int, error: torch.Tensor) -> None:
        """A step should have been given so much more."""
        self._recent[step] = error
        row, start = self._response.weights[step + 1], self._response.start[step + 1]
        for k in [k for k in self._recent if k <= step + 1 - self._response.memory and start]:
            part = self._recent.pop(k) * (row[k] / start)
            self._carried = part if self._carried is None else self._carried + part

    def at(self, step: int) -> torch.Tensor | None:
        """In the latents before ``step``, which is after those learnt; None if none was yet."""
        row = self._response.weights[step]
        parts = [error * row[k] for k, error in self._recent.items()]
        if self._carried is not None:
            parts.append(self._carried * self._response.start[step])
        return functools.reduce(torch.add, parts) if parts else None
