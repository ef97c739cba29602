"""What preparing costs, by phase.

What is a phase says so by :func:`phase`; who wants to know asks by :func:`recording`, further out,
so that nothing in between has to pass it on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

from .progress import stage

#: In the order in which they are told: what is exported or loaded from the disk, nodes that are
#: timed, the cut, ranks and channels, compiling, components that are timed, CUDA graphs, what is
#: still to be moved to host memory in the end.
PHASES = ("load", "export", "measure", "cut", "build", "compile", "balance", "capture", "offload")


#: What is shown of phases that tell nothing themselves.
_SAID = {
    "load": "looking for what was prepared before",
    "cut": "cutting the denoiser",
    "build": "making ranks ready",
    "balance": "timing the components",
    "offload": "moving the denoiser to host memory",
}


@dataclass
class Spent:
    """Seconds by phase, each without phases inside of it; and ``total``, what belongs to none
    included."""

    phases: dict[str, float] = field(default_factory=dict)
    total: float = 0.0

    def add(self, other: Spent) -> None:
        """Take in what was spent elsewhere, too."""
        self.total += other.total
        for name, seconds in other.phases.items():
            self.phases[name] = self.phases.get(name, 0.0) + seconds

    def in_order(self) -> dict[str, float]:
        """The phases that there were, in the order of :data:`PHASES`."""
        return {name: self.phases[name] for name in PHASES if name in self.phases}


@dataclass
class _Clock:
    """Where seconds go now. ``inside``: those that phases inside of the current one took."""

    spent: Spent
    inside: float = 0.0


_clock: ContextVar[_Clock | None] = ContextVar("asyncdiff_phases", default=None)


@contextlib.contextmanager
def recording() -> Iterator[Spent]:
    """What is spent meanwhile; whoever records further out is told at the end, too."""
    outer, clock = _clock.get(), _Clock(Spent())
    token = _clock.set(clock)
    started = time.perf_counter()
    try:
        yield clock.spent
    finally:
        _clock.reset(token)
        clock.spent.total = time.perf_counter() - started
        if outer is not None:
            outer.spent.add(Spent(clock.spent.phases))
            outer.inside += clock.spent.total


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Something that is the phase ``name`` of a preparation; also as a decorator. Whoever listens
    to progress is told of it, where nothing inside tells more."""
    with stage(_SAID[name]) if name in _SAID else contextlib.nullcontext(), _timed(name):
        yield


@contextlib.contextmanager
def _timed(name: str) -> Iterator[None]:
    clock = _clock.get()
    if clock is None:
        yield
        return
    before, clock.inside = clock.inside, 0.0
    started = time.perf_counter()
    try:
        yield
    finally:
        took = time.perf_counter() - started
        clock.spent.add(Spent({name: max(took - clock.inside, 0.0)}))
        clock.inside = before + took
