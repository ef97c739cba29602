"""What a plan is made of: actions of ranks, ticks of actions, exchanges between components."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(str, Enum):
    """What an action does on its rank."""

    GET = "G"  #: wait for the next bundle from a component
    RUN = "R"  #: run the rank's component, then push its boundary
    RELEASE = "L"  #: give the oldest held bundle back to its sender


@dataclass(frozen=True)
class Action:
    """One thing that one rank does.

    ``component`` is the component that runs (RUN) or whose bundle is taken or given back (GET,
    RELEASE). The other fields belong to RUN: ``latents`` is the step whose latents are the input,
    ``time`` the index of the timestep, ``step`` the step whose noise prediction this run delivers
    (None if its output is not used), ``put`` the ordinal of the bundle that it sends (None for
    runs that send nothing), ``reads`` the ordinals of the bundles read, by sending component (two
    for a component whose values are extrapolated, the newer one first).
    """

    kind: Kind
    rank: int
    component: int
    latents: int | None = None
    time: int | None = None
    step: int | None = None
    put: int | None = None
    reads: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Tick:
    """A batch of runs: one after another (``exact``) or all at once.

    ``serves`` are the sampler steps that are taken after it.
    """

    index: int
    exact: bool
    serves: tuple[int, ...]
    actions: tuple[Action, ...]

    @property
    def runs(self) -> tuple[Action, ...]:
        """The runs of this tick, in issue order."""
        return tuple(a for a in self.actions if a.kind is Kind.RUN)

    @property
    def delivers(self) -> tuple[int, ...]:
        """The steps whose noise predictions come out of it, in order."""
        return tuple(sorted(a.step for a in self.actions if a.step is not None))


@dataclass(frozen=True)
class Exchange:
    """Bundles from component ``source`` to ``target``, used ``lag`` ticks after they were made."""

    source: int
    target: int
    lag: int = 1
