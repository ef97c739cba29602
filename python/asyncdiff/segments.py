"""A plan with the sampler's update on the ranks: what each rank issues in a tick, in one piece.

Every rank that reads latents keeps them itself and takes the sampler's steps itself, from the
predictions of the tick before, so that nobody stands between two ticks. Pure data, like the plan.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from .plan import Action, Kind, Plan, Tick


@dataclass(frozen=True)
class Op:
    """An action with its slots, as the same in every tick that uses the same slots.

    GET and RELEASE: ``slot`` of the bundle from ``component``. RUN: ``reads`` are the slots read,
    by sending component, ``slot`` the one written (None: nothing is sent), ``delivers`` the slot in
    which the prediction goes out (None: it is not used).
    """

    kind: Kind
    component: int
    slot: int | None
    reads: tuple[tuple[int, int], ...] = ()
    delivers: int | None = None


@dataclass(frozen=True)
class Segment:
    """What a rank issues at once; equal segments are one CUDA graph.

    ``advance``: None, or go on to this tick first. A rank that reads latents then takes one step
    for each prediction, which came from (rank, slot); the others only set their time. Between waves
    it is one step a tick, whether a prediction came or none.
    """

    rank: int
    advance: tuple[tuple[int, int], ...] | None
    ops: tuple[Op, ...]


def segments(plan: Plan, readers: Collection[int]) -> list[list[Segment]]:
    """The segments of every tick, in a legal issue order, and those after the last tick.

    ``readers`` are the ranks that read latents. As in a plan, whoever issues the segments one after
    another never waits for something that was not issued before.
    """
    counts: Counter[tuple[Kind, int, int]] = Counter()
    delivered: Counter[int] = Counter()
    sources: tuple[tuple[int, int], ...] | None = None  # of the predictions of the tick before
    out = []
    for tick in plan.ticks:
        found: dict[int, tuple[int, int]] = {}
        waiting = dict.fromkeys(range(plan.ranks))  # ranks that have not advanced to this tick
        issued = []
        pieces = _pieces(tick)
        idle = waiting.keys() - {rank for rank, _ in pieces}
        for rank, actions in [*((r, []) for r in sorted(idle)), *pieces]:
            advance = None
            if rank in waiting:
                del waiting[rank]
                if sources is not None:
                    advance = sources if rank in readers else ()
            ops = []
            for action in actions:
                ops.append(_op(action, plan.slots, counts, delivered))
                if action.step is not None:
                    slot = ops[-1].delivers
                    assert slot is not None
                    found[action.step] = (rank, slot)
            if ops or advance is not None:
                issued.append(Segment(rank, advance, tuple(ops)))
        sources = tuple(found[step] for step in tick.delivers)
        out.append(issued)
    out.append([Segment(rank, sources, ()) for rank in sorted(readers)])
    return out


def _pieces(tick: Tick) -> list[tuple[int, list[Action]]]:
    """The actions of a tick by rank, each rank's in as few pieces as the order allows."""
    if tick.exact:
        return _consecutive(tick.actions)
    # What ranks take before they run is of earlier ticks, so that in between their order is free.
    # What they take afterwards (at the end of a generation, to empty the channels) may be of this.
    ran = False
    end = len(tick.actions)
    for i, action in enumerate(tick.actions):
        ran = ran or action.kind is Kind.RUN
        if ran and action.kind is Kind.GET:
            end = i
            break
    by_rank: dict[int, list[Action]] = {}
    for action in tick.actions[:end]:
        by_rank.setdefault(action.rank, []).append(action)
    return [*by_rank.items(), *_consecutive(tick.actions[end:])]


def _consecutive(actions: Iterable[Action]) -> list[tuple[int, list[Action]]]:
    return [(rank, list(group)) for rank, group in itertools.groupby(actions, lambda a: a.rank)]


def _op(
    action: Action, slots: int, counts: Counter[tuple[Kind, int, int]], delivered: Counter[int]
) -> Op:
    if action.kind is not Kind.RUN:
        key = (action.kind, action.rank, action.component)
        slot = counts[key] % slots
        counts[key] += 1
        return Op(action.kind, action.component, slot)
    delivers = None
    if action.step is not None:
        delivers = delivered[action.rank] % slots
        delivered[action.rank] += 1
    reads = tuple((source, max(ordinal, 0) % slots) for source, ordinal in action.reads)
    put = None if action.put is None else action.put % slots
    return Op(action.kind, action.component, put, reads, delivers)
