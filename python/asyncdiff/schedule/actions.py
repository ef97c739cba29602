"""What a plan is made of: actions of ranks, ticks of actions, exchanges between components."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import NamedTuple


class Kind(str, Enum):
    """What an action does on its rank."""

    GET = "G"  #: wait for the next bundle from a component
    RUN = "R"  #: run the rank's component, then push its boundary
    RELEASE = "L"  #: give the oldest held bundle back to its sender


#: In place of an ordinal and a slot: no bundle is sent.
NOTHING = -1
#: Slots that a run touches: of the bundles that it reads, by sending component (of one whose values
#: are extrapolated two, the newer one first), and of the one that it sends.
Slots = tuple[tuple[tuple[int, int], ...], int]


class Bundle(NamedTuple):
    """A bundle by the component that sent it, its ordinal on that component's channels, counted
    from 0, and the slot of the mailbox that it lies in. Ordinal −1: nothing was sent yet."""

    source: int
    ordinal: int
    slot: int


@dataclass(frozen=True)
class Action:
    """One thing that one rank does.

    ``component`` is the component that runs (RUN) or whose bundle is taken or given back (GET,
    RELEASE). ``ordinal`` and ``slot`` are those of the bundle that is taken or given back; of a run
    those of the bundle that it sends (:data:`NOTHING` where it sends none).

    The other fields belong to RUN: ``latents`` is the step whose latents are the input, ``time``
    the index of the timestep, ``step`` the step whose noise prediction this run delivers (None if
    its output is not used), ``reads`` the bundles read (two of a component whose values are
    extrapolated, the newer one first).
    """

    kind: Kind
    rank: int
    component: int
    ordinal: int = NOTHING
    slot: int = NOTHING
    latents: int | None = None
    time: int | None = None
    step: int | None = None
    reads: tuple[Bundle, ...] = ()

    @cached_property
    def slots(self) -> Slots:
        """The slots that a run touches: what one CUDA graph serves."""
        return tuple((b.source, b.slot) for b in self.reads), self.slot


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
