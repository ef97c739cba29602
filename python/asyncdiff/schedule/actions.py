"""What a plan is made of: actions of ranks, segments and ticks of actions, exchanges."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
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
#: are extrapolated two, the newer one first), and of the one that it sends; and whether its output
#: is a noise prediction that the sampler gets.
Slots = tuple[tuple[tuple[int, int], ...], int, bool]


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
        return tuple((b.source, b.slot) for b in self.reads), self.slot, self.step is not None


@dataclass(frozen=True)
class Segment:
    """Actions that ``rank`` issues one after another, without waiting for the host."""

    rank: int
    actions: tuple[Action, ...]

    @cached_property
    def run(self) -> Action | None:
        """The run among them; a segment has one at most."""
        return next((a for a in self.actions if a.kind is Kind.RUN), None)

    @cached_property
    def step(self) -> int | None:
        """The step whose noise prediction it delivers."""
        return None if self.run is None else self.run.step


@dataclass(frozen=True)
class Tick:
    """A batch of runs: one after another (``exact``) or all at once.

    ``serves`` are the sampler steps that are taken after it, of ``microbatch`` where the batch is
    cut.
    """

    index: int
    exact: bool
    serves: tuple[int, ...]
    actions: tuple[Action, ...]
    microbatch: int = 0

    @cached_property
    def runs(self) -> tuple[Action, ...]:
        """The runs of this tick, in issue order."""
        return tuple(a for a in self.actions if a.kind is Kind.RUN)

    @property
    def delivers(self) -> tuple[int, ...]:
        """The steps whose noise predictions come out of it, in order."""
        return tuple(sorted(a.step for a in self.actions if a.step is not None))

    @cached_property
    def times(self) -> tuple[int, ...]:
        """The indices of the timesteps that its runs need."""
        return tuple(dict.fromkeys(a.time for a in self.runs if a.time is not None))

    @cached_property
    def latents(self) -> tuple[int, ...]:
        """The steps whose latents its runs need."""
        return tuple(dict.fromkeys(a.latents for a in self.runs if a.latents is not None))

    @cached_property
    def ranks(self) -> frozenset[int]:
        """The ranks that run."""
        return frozenset(a.rank for a in self.runs)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Its actions in pieces of one rank: what an engine issues, a simulation walks through, and
        a process that owns some ranks runs alone.

        As in a plan, whoever issues the segments one after another never waits for something that
        was not issued before. What ranks take before they run in an asynchronous tick is of earlier
        ticks, so that in between their order is free: each rank has one segment. What they take
        afterwards (at the end of a generation, to empty the channels) may be of this tick.
        """
        if self.exact:
            return tuple(_consecutive(self.actions))
        late = len(self.actions)
        if self.runs:
            first = self.actions.index(self.runs[0])
            taken = (i for i in range(first, late) if self.actions[i].kind is Kind.GET)
            late = next(taken, late)
        turns = {rank: i for i, rank in enumerate(dict.fromkeys(a.rank for a in self.actions))}
        early = sorted(self.actions[:late], key=lambda a: turns[a.rank])
        return (*_consecutive(early), *_consecutive(self.actions[late:]))


def _consecutive(actions: Iterable[Action]) -> Iterator[Segment]:
    for rank, group in itertools.groupby(actions, lambda a: a.rank):
        mine: list[Action] = []
        for action in group:
            if action.kind is Kind.RUN and any(a.kind is Kind.RUN for a in mine):
                yield Segment(rank, tuple(mine))
                mine = []
            mine.append(action)
        yield Segment(rank, tuple(mine))


@dataclass(frozen=True)
class Exchange:
    """Bundles from component ``source`` to ``target``, used ``lag`` ticks after they were made."""

    source: int
    target: int
    lag: int = 1
