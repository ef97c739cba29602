"""Segments: a plan's actions in other pieces, every rank one step ahead at a time, never stuck."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdiff import plan as P
from asyncdiff.segments import Segment, segments

numbers = st.tuples(
    st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.integers(0, 12), st.booleans()
)


def simulate(plan: P.Plan, readers: set[int]) -> None:
    """Issue the segments one after another, as ranks that share a device do: no wait may be for
    what comes later, no slot be written while it is held, and no step be lost."""
    ticks = segments(plan, readers)
    put: Counter[tuple[object, int]] = Counter()  # bundles by (sender, receiving rank)
    got: Counter[tuple[object, int]] = Counter()
    freed: Counter[tuple[object, int]] = Counter()
    waves = plan.schedule == "wavefront"
    # Waves: one update a tick. Else: one a step.
    steps = Counter(dict.fromkeys(readers, 0))
    waiting: dict[tuple[int, int], list[int]] = {}  # (rank, sender) -> steps of predictions

    def send(sender: object, receiver: int) -> None:
        key = (sender, receiver)
        assert put[key] - freed[key] < plan.slots, "written while it is still held"
        put[key] += 1

    def take(sender: object, receiver: int, slot: int) -> None:
        key = (sender, receiver)
        assert got[key] < put[key], "a wait for what was not issued"
        assert got[key] % plan.slots == slot
        got[key] += 1

    for index, issued in enumerate(ticks):
        tick = plan.ticks[index] if index < len(plan.ticks) else None
        by_rank: dict[int, list[P.Action]] = {}
        for action in tick.actions if tick is not None else ():
            by_rank.setdefault(action.rank, []).append(action)
        advanced: set[int] = set()
        done: Counter[int] = Counter()
        for segment in issued:
            rank = segment.rank
            if segment.advance is not None:
                assert rank not in advanced and done[rank] == 0
                advanced.add(rank)
                if rank in readers:
                    assert segment.advance or waves
                    if waves:
                        delivered = plan.ticks[index - 1].delivers
                        assert len(segment.advance) == len(delivered) <= 1
                        steps[rank] += 1
                for sender, slot in segment.advance:
                    if sender != rank:
                        take(("prediction", sender), rank, slot)
                        freed[("prediction", sender), rank] += 1
                    step = waiting[rank, sender].pop(0)
                    if waves:
                        assert (step,) == plan.ticks[index - 1].delivers
                    else:
                        assert step == steps[rank], "steps out of order"
                        steps[rank] += 1
            for op in segment.ops:
                assert tick is not None
                action = by_rank[rank][done[rank]]
                done[rank] += 1
                assert (op.kind, op.component) == (action.kind, action.component)
                if op.kind is P.Kind.GET:
                    assert op.slot is not None
                    take(op.component, rank, op.slot)
                elif op.kind is P.Kind.RELEASE:
                    key = (op.component, rank)
                    assert freed[key] < got[key] and freed[key] % plan.slots == op.slot
                    freed[key] += 1
                else:
                    if rank in readers:
                        now = index if waves else action.latents
                        assert steps[rank] == now, "latents of another step"
                    for source, slot in op.reads:
                        if got[source, rank]:
                            held = range(freed[source, rank], got[source, rank])
                            assert slot in {ordinal % plan.slots for ordinal in held}
                    if op.slot is not None:
                        for exchange in plan.exchanges:
                            if exchange.source == op.component:
                                for receiver in plan.ranks_of(exchange.target):
                                    assert put[op.component, receiver] % plan.slots == op.slot
                                    send(op.component, receiver)
                    if action.step is not None:
                        assert op.delivers is not None
                        for reader in readers:
                            queue = waiting.setdefault((reader, rank), [])
                            if reader != rank:
                                send(("prediction", rank), reader)
                            else:
                                assert not queue, "a prediction is overwritten"
                            queue.append(action.step)
        if tick is not None:
            assert all(done[r] == len(a) for r, a in by_rank.items()), "an action was lost"
            if index > 0:
                assert advanced == set(range(plan.ranks))
    assert all(count == (len(plan.ticks) if waves else plan.steps) for count in steps.values())
    assert put == got == freed


@settings(max_examples=150, deadline=None)
@given(numbers, st.data())
def test_any_plan(args: tuple[int, int, int, int, bool], data: st.DataObject) -> None:
    n, s, w, more, shift = args
    plan = P.build(n, s, w, w + more, time_shift=shift)
    ranks = st.sets(st.integers(0, plan.ranks - 1), min_size=1)
    simulate(plan, data.draw(ranks))


@settings(max_examples=150, deadline=None)
@given(numbers, st.integers(0, 3), st.booleans(), st.integers(1, 4), st.data())
def test_any_plan_of_waves(
    args: tuple[int, int, int, int, bool], tail: int, drain: bool, delay: int, data: st.DataObject
) -> None:
    n, s, w, more, _ = args
    steps = w + more + tail
    late = min(delay, n - 1) or None
    plan = P.build(n, s, w, steps, schedule="wavefront", exact_tail=tail, drain=drain, delay=late)
    ranks = st.sets(st.integers(0, plan.ranks - 1), min_size=1)
    simulate(plan, data.draw(ranks))


@settings(max_examples=100, deadline=None)
@given(numbers, st.integers(0, 3), st.data())
def test_any_plan_with_a_tail_and_extrapolation(
    args: tuple[int, int, int, int, bool], tail: int, data: st.DataObject
) -> None:
    n, s, w, more, _ = args
    plan = P.build(n, s, w, w + more + tail, exact_tail=tail, extrapolate=1.0)
    ranks = st.sets(st.integers(0, plan.ranks - 1), min_size=1)
    simulate(plan, data.draw(ranks))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_circle(stride: int) -> None:
    edges = [P.Exchange(0, 1), P.Exchange(1, 0)]
    plan = P.build(2, stride, 2, 9, exchanges=edges, exact_order=(1, 0, 1))
    simulate(plan, {0, 1})


@pytest.mark.parametrize(("components", "stride"), [(1, 1), (2, 1), (3, 1), (2, 2), (3, 3)])
def test_one_segment_a_rank_in_a_tick_and_few_that_differ(components: int, stride: int) -> None:
    """Each distinct segment is a CUDA graph to record; a tick should be one launch a rank."""
    plan = P.build(components, stride, 1, 50)
    ticks = segments(plan, {0})
    for tick in ticks[2:-2]:
        assert sorted(s.rank for s in tick) == list(range(plan.ranks))
    distinct: Counter[int] = Counter(s.rank for s in {s for tick in ticks for s in tick})
    assert max(distinct.values()) <= 8
    assert all(isinstance(s, Segment) for tick in ticks for s in tick)
