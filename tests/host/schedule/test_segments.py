"""Segments: a plan's actions in pieces of one rank; nobody waits for what comes later."""

from __future__ import annotations

from collections import Counter, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdiff.schedule import plan as P
from asyncdiff.schedule.actions import Segment

numbers = st.tuples(
    st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.integers(0, 12), st.booleans()
)


class Channels:
    """Bundles by (sending component, receiving rank): sent, taken, given back."""

    def __init__(self, plan: P.Plan) -> None:
        self.plan = plan
        self.sent: Counter[tuple[int, int]] = Counter()
        self.taken: Counter[tuple[int, int]] = Counter()
        self.freed: Counter[tuple[int, int]] = Counter()

    def receivers(self, component: int) -> list[tuple[int, int]]:
        return [
            (component, rank)
            for e in self.plan.exchanges
            if e.source == component
            for rank in self.plan.ranks_of(e.target)
        ]

    def possible(self, action: P.Action) -> bool:
        """Whether an action need not wait."""
        key = action.component, action.rank
        if action.kind is P.Kind.GET:
            return self.taken[key] < self.sent[key]
        if action.kind is P.Kind.RUN and action.ordinal >= 0:
            keys = self.receivers(action.component)
            return all(self.sent[k] - self.freed[k] < self.plan.slots for k in keys)
        return True

    def do(self, action: P.Action) -> None:
        key = action.component, action.rank
        if action.kind is P.Kind.GET:
            assert action.ordinal == self.taken[key]
            self.taken[key] += 1
        elif action.kind is P.Kind.RELEASE:
            assert action.ordinal == self.freed[key] < self.taken[key]
            self.freed[key] += 1
        else:
            for source, ordinal, _ in action.reads:
                if ordinal >= 0:
                    held = range(self.freed[source, action.rank], self.taken[source, action.rank])
                    assert ordinal in held
            if action.ordinal >= 0:
                for k in self.receivers(action.component):
                    assert self.sent[k] == action.ordinal
                    self.sent[k] += 1


def in_turn(plan: P.Plan) -> None:
    """Issue the segments one after another, as ranks that share a device do."""
    channels = Channels(plan)
    for tick in plan.ticks:
        for rank in range(plan.ranks):
            mine = [a for s in tick.segments if s.rank == rank for a in s.actions]
            assert mine == [a for a in tick.actions if a.rank == rank], "a rank's order is kept"
        assert {a.time for a in tick.runs} == set(tick.times)
        assert {a.latents for a in tick.runs} == set(tick.latents)
        assert {a.rank for a in tick.runs} == tick.ranks
        for segment in tick.segments:
            assert sum(a.kind is P.Kind.RUN for a in segment.actions) <= 1
            for action in segment.actions:
                assert channels.possible(action), "a wait for what was not issued"
                channels.do(action)
    assert channels.sent == channels.taken == channels.freed


def by_rank(plan: P.Plan, order: list[int]) -> None:
    """Every rank goes through its own segments, as far as it can; ``order`` says who is quick. In a
    tick the sampler has the steps before it: no rank begins a tick before they are served."""
    channels = Channels(plan)
    for tick in plan.ticks:
        queues = {r: deque[P.Action]() for r in order}
        for segment in tick.segments:
            queues[segment.rank].extend(segment.actions)
        moved = True
        while moved:
            moved = False
            for rank in order:
                while queues[rank] and channels.possible(queues[rank][0]):
                    channels.do(queues[rank].popleft())
                    moved = True
        assert not any(queues.values()), "ranks wait for each other"


def check(plan: P.Plan, data: st.DataObject) -> None:
    in_turn(plan)
    by_rank(plan, data.draw(st.permutations(range(plan.ranks))))


@settings(max_examples=100, deadline=None)
@given(numbers, st.data())
def test_any_plan(args: tuple[int, int, int, int, bool], data: st.DataObject) -> None:
    n, s, w, more, shift = args
    check(P.build(n, s, w, w + more, time_shift=shift), data)


@settings(max_examples=100, deadline=None)
@given(numbers, st.integers(0, 3), st.integers(1, 4), st.data())
def test_any_plan_of_waves(
    args: tuple[int, int, int, int, bool], tail: int, delay: int, data: st.DataObject
) -> None:
    n, s, w, more, _ = args
    late = min(delay, n - 1) or None
    steps = w + more + tail
    check(P.build(n, s, w, steps, schedule="wavefront", exact_tail=tail, delay=late), data)


@settings(max_examples=60, deadline=None)
@given(numbers, st.integers(0, 3), st.data())
def test_any_plan_with_a_tail_and_extrapolation(
    args: tuple[int, int, int, int, bool], tail: int, data: st.DataObject
) -> None:
    n, s, w, more, _ = args
    check(P.build(n, s, w, w + more + tail, exact_tail=tail, extrapolate=1.0), data)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_circle(stride: int) -> None:
    edges = [P.Exchange(0, 1), P.Exchange(1, 0)]
    in_turn(P.build(2, stride, 2, 9, exchanges=edges, exact_order=(1, 0, 1)))


@pytest.mark.parametrize(("components", "stride"), [(1, 1), (2, 1), (3, 1), (2, 2), (3, 3)])
def test_one_segment_a_rank_in_a_tick(components: int, stride: int) -> None:
    plan = P.build(components, stride, 1, 50)
    for tick in plan.ticks[2:-2]:
        assert sorted(s.rank for s in tick.segments) == list(range(plan.ranks))
        assert tick.segments is tick.segments  # lowered once
    assert all(isinstance(s, Segment) for tick in plan.ticks for s in tick.segments)
