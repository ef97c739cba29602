"""Which of a component's bundles cross whole, and which compressed.

Exact steps decide what becomes of a picture, and are few: what they send crosses whole, by a
channel of its own. So the first bundle of a generation does, from which the ends of the other
channel begin to count. Senders and readers know from the plan which bundle goes where.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from ....schedule.actions import NOTHING, Action, Tick


class Compressed(NamedTuple):
    """Boundaries, by components, whose bundles cross compressed, and what their codes are."""

    edges: frozenset[tuple[int, int]]
    kind: str


NOTHING_COMPRESSED = Compressed(frozenset(), "")


class Route(NamedTuple):
    """The way of a bundle: whether it crosses ``whole``, in which ``slot`` of that channel; whether
    it is the ``first`` of its component."""

    whole: bool
    slot: int
    first: bool


class Write(NamedTuple):
    """Where a run's bundle goes: its slot among all of its component, as in the plan, in which both
    ends keep what they have of it, and its route."""

    slot: int
    route: Route


#: What :data:`~....schedule.actions.Slots` are where bundles cross compressed.
Runs = tuple[tuple[tuple[int, int], ...], "int | Write", bool]


class Sent:
    """The bundles that were sent since :meth:`begin`, by component. Channels have ``slots`` slots.

    One thread adds ticks, before their actions are issued; others may ask meanwhile.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self.begin()

    def begin(self) -> None:
        """Nothing was sent yet."""
        self._routes: defaultdict[int, list[Route]] = defaultdict(list)
        self._counts: defaultdict[tuple[int, bool], int] = defaultdict(int)

    def add(self, tick: Tick) -> None:
        """Take note of what the runs of a tick send."""
        for run in tick.runs:
            if run.ordinal != NOTHING:
                routes, kind = self._routes[run.component], (run.component, tick.exact)
                slot = self._counts[kind] % self._slots
                self._counts[kind] += 1
                routes.append(Route(tick.exact, slot, not routes))

    def route(self, component: int, ordinal: int) -> Route:
        """The way of the ``ordinal``-th bundle of a component."""
        return self._routes[component][ordinal]

    def slots(self, run: Action) -> Runs:
        """The slots that a run touches: what one CUDA graph serves."""
        reads, slot, delivers = run.slots
        if slot == NOTHING:
            return run.slots
        return reads, Write(slot, self.route(run.component, run.ordinal)), delivers
