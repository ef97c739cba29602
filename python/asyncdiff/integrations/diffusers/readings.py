"""What the timestep argument of a denoiser's first call says: which of the scheduler's timesteps it
was made of, and how."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...errors import SchedulerError

_Mapping = Callable[[torch.Tensor, float], torch.Tensor]
#: What pipelines make of a scheduler's timestep t: SD and SVD pass it on, FLUX passes t/1000,
#: others count from the other end (n is the number of training timesteps).
_MAPPINGS: tuple[tuple[str, _Mapping], ...] = (
    ("t", lambda t, n: t),
    ("t / n", lambda t, n: t / n),
    ("1 - t / n", lambda t, n: 1 - t / n),
    ("n - t", lambda t, n: n - t),
)
#: Pipelines that pass such times also turn a flow prediction's sign (Lumina 2, Z-Image).
_BACKWARDS = ("1 - t / n", "n - t")
#: In which order they go to the denoiser's precision. To half of it that makes a difference.
_ORDERS: tuple[Callable[[_Mapping, torch.Tensor, float, torch.dtype], torch.Tensor], ...] = (
    lambda mapping, t, n, dtype: mapping(t.to(dtype), n).to(dtype),
    lambda mapping, t, n, dtype: mapping(t, n).to(dtype),
)

#: What pipelines make of timesteps in ways that are not known (the logarithm of a noise level).
_UNKNOWN = "unknown"

#: What a refusal ends with.
ANOTHER = "or another pipeline calls it, with a scheduler of its own (parallelise that one)"


@dataclass(frozen=True, eq=False)
class Reading:
    """A way to read the first call: the ``start``-th timestep, mapped by ``mapping``, rounded by
    the ``order``-th of two ways. ``values`` and ``exact`` (float64, on the host) are what calls
    with each of the schedule's timesteps pass then."""

    mapping: str
    order: int
    start: int
    values: torch.Tensor
    exact: torch.Tensor

    @property
    def known(self) -> bool:
        """Whether it is known what calls pass; else steps go by the order of calls."""
        return self.mapping != _UNKNOWN

    @property
    def backwards(self) -> bool:
        """Whether the denoiser counts time from the other end than the scheduler."""
        return self.mapping in _BACKWARDS

    def after(self, step: int) -> Reading:
        """The same, where the ``step``-th call comes first."""
        return replace(self, start=self.start + step)

    @property
    def way(self) -> tuple[str, int]:
        """How arguments are made of timesteps."""
        return self.mapping, self.order

    def at(self, step: int) -> float | None:
        """What the ``step``-th call passes; None past the end of the schedule."""
        index = self.start + step
        return float(self.exact[index]) if index < len(self.exact) else None


def readings(
    scheduler: Any, source: torch.Tensor, first: torch.Tensor, steps: int | None, like: Any
) -> list[Reading]:
    """All ways to read a first call, ``first``, of ``steps`` (None: it is not known how many), the
    likeliest first: the nearest, those made as ``like`` (a :attr:`Reading.way`) says, those that
    begin at the first timestep or end with the last.

    Raises SchedulerError where there is none.
    """
    rounding = 1e-5 + 2 * torch.finfo(first.dtype).eps if first.is_floating_point() else 0.0
    train = float(getattr(scheduler.config, "num_train_timesteps", 1000) or 1000)
    found: list[tuple[float, Reading]] = []
    ways = list(itertools.product(_MAPPINGS, enumerate(_ORDERS)))
    # Where and as the pipeline computes them, so that they have the same bits.
    each = [make(m, source.detach(), train, first.dtype) for (_, m), (_, make) in ways]
    # All at once: on a GPU the host waits.
    known = first.detach().reshape(-1).double().to(source.device)
    known = torch.cat([known, *(v.double() for v in each)]).cpu()
    value = float(moving(known[: first.numel()]))
    exacts = known[first.numel() :].view(len(each), -1)
    for ((name, _), (order, _)), values, exact in zip(ways, each, exacts, strict=True):
        distance = (exact - value).abs()
        error = float(distance.min()) / (float(exact.abs().max()) or 1.0)
        if error <= rounding:
            nearest = (distance == distance.min()).nonzero().reshape(-1).tolist()
            found += [(error, Reading(name, order, index, values, exact)) for index in nearest]
    last = len(source) - (steps or 0)
    found = [f for f in found if f[1].start <= last] or found
    if not found:
        raise SchedulerError(
            f"the denoiser was called with timestep {value:g}, which is not made from the "
            f"timesteps of {type(scheduler).__name__} in a way that is known "
            f"({', '.join(n for n, _ in _MAPPINGS)}): use asyncdiff.AsyncDenoiser and pass "
            f"the denoiser's timesteps to its generation(); {ANOTHER}"
        )
    ends = (0, last) if steps else (0,)
    found.sort(key=lambda f: (f[0], f[1].way != like, f[1].start not in ends))
    return [reading for _, reading in found]


def by_order(source: torch.Tensor, first: torch.Tensor, steps: int | None) -> Reading:
    """How calls are read whose arguments are made from the timesteps in a way that is not known:
    they come one after another, the last ``steps`` of them (None: all)."""
    start = len(source) - steps if steps else 0
    kind = first.dtype if first.is_floating_point() else torch.float64
    values = torch.full(source.shape, math.nan, dtype=kind, device=source.device)
    return Reading(_UNKNOWN, 0, max(start, 0), values, values.double().cpu())


def moving(timestep: torch.Tensor) -> torch.Tensor:
    """The timestep of the parts that the sampler moves: where others are given as they are (the
    first frame of a video), theirs is 0."""
    flat = timestep.reshape(-1)
    others = flat[flat != 0]
    return others[0] if len(others) else flat[0]
