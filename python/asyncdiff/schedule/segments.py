"""A plan lowered: what each rank issues at once, between two points at which the sampler steps.

An engine issues segments, a simulation walks through them, and a process that owns some ranks runs
their segments alone. As in a plan, whoever issues the segments one after another never waits for
something that was not issued before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from .actions import Action, Kind, Tick


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
class LoweredTick:
    """A tick's segments in a legal issue order. After it the sampler takes the steps ``serves``.

    ``times`` are the indices of the timesteps that its runs need, ``latents`` the steps whose
    latents they need, ``ranks`` those that have a segment with a run.
    """

    index: int
    exact: bool
    serves: tuple[int, ...]
    segments: tuple[Segment, ...]
    times: tuple[int, ...]
    latents: tuple[int, ...]
    ranks: frozenset[int]


def lower(ticks: Iterable[Tick]) -> tuple[LoweredTick, ...]:
    """The segments of every tick."""
    return tuple(_lowered(tick) for tick in ticks)


def _lowered(tick: Tick) -> LoweredTick:
    runs = tick.runs
    return LoweredTick(
        tick.index,
        tick.exact,
        tick.serves,
        tuple(_consecutive(tick.actions) if tick.exact else _by_rank(tick.actions)),
        tuple(dict.fromkeys(a.time for a in runs if a.time is not None)),
        tuple(dict.fromkeys(a.latents for a in runs if a.latents is not None)),
        frozenset(a.rank for a in runs),
    )


def _by_rank(actions: tuple[Action, ...]) -> Iterable[Segment]:
    """The actions of an asynchronous tick by rank.

    What ranks take before they run is of earlier ticks, so that in between their order is free.
    What they take afterwards (at the end of a generation, to empty the channels) may be of this.
    """
    ran = False
    end = len(actions)
    for i, action in enumerate(actions):
        ran = ran or action.kind is Kind.RUN
        if ran and action.kind is Kind.GET:
            end = i
            break
    by_rank: dict[int, list[Action]] = {}
    for action in actions[:end]:
        by_rank.setdefault(action.rank, []).append(action)
    yield from (Segment(rank, tuple(mine)) for rank, mine in by_rank.items())
    yield from _consecutive(actions[end:])


def _consecutive(actions: Iterable[Action]) -> Iterable[Segment]:
    for rank, group in itertools.groupby(actions, lambda a: a.rank):
        mine: list[Action] = []
        for action in group:
            if action.kind is Kind.RUN and any(a.kind is Kind.RUN for a in mine):
                yield Segment(rank, tuple(mine))
                mine = []
            mine.append(action)
        yield Segment(rank, tuple(mine))
