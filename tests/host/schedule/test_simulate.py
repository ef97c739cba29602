"""Predicted latency: small cases worked out by hand, and what must hold for every plan."""

import math
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdiff.errors import PlanError
from asyncdiff.schedule import plan as P
from asyncdiff.schedule import text as plan_text
from asyncdiff.schedule.plot import draw
from asyncdiff.schedule.simulate import SpanKind, Timing, predict, summary


def spans(timeline, rank, kind=SpanKind.RUN):
    return [(s.start_ms, s.end_ms) for s in timeline.of(rank) if s.kind is kind]


def test_one_component_is_the_sequential_loop():
    t = predict(P.build(1, 1, 1, 4), Timing((3.0,), update_ms=1.0))
    assert t.total_ms == t.sequential_ms == 16
    assert t.speedup == 1 and t.busy == (1.0,) and t.exposed_ms == 0


def test_two_components_without_link_time():
    # step 0 exactly: 2 + 3; then three ticks of max(2, 3)
    t = predict(P.build(2, 1, 1, 4), Timing((2.0, 3.0)))
    assert spans(t, 0) == [(0, 2), (5, 7), (8, 10), (11, 13)]
    assert spans(t, 1) == [(2, 5), (5, 8), (8, 11), (11, 14)]
    assert (t.total_ms, t.sequential_ms) == (14, 20)
    assert t.busy == (8 / 14, 12 / 14)


def test_exchange_hides_behind_the_run_but_for_its_tail():
    # 1 GB/s: 4 ms a bundle, of which 1 ms (the tail) can only leave after the run. Step 0: rank 0
    # runs 0-10, early bytes 0-3, tail 10-11, rank 1 runs 11-21. Tick 1: both start at 21; its
    # bundle is there at 32, but the next tick only starts with the latents, at 31: 1 ms late.
    timing = Timing((10.0, 10.0), {(0, 1): 4_000_000}, {(0, 1): 1_000_000}, link_gb_per_s=1.0)
    t = predict(P.build(2, 1, 1, 3), timing)
    assert spans(t, 0, SpanKind.EXCHANGE)[:2] == [(0, 3), (10, 11)]
    assert spans(t, 1) == [(11, 21), (21, 31), (32, 42)]
    assert spans(t, 0) == [(0, 10), (21, 31), (31, 41)]
    assert t.total_ms == 42 and t.exposed_ms == 2
    # Of the last tick's bundle nobody reads a byte, yet it is sent.
    assert t.exchange_bytes == 3 * 4_000_000


def test_latency_of_noise_and_latents():
    # 1 ms latency: boundary 1 ms, noise to rank 0 1 ms, latents to rank 1 1 ms.
    t = predict(P.build(2, 1, 1, 2), Timing((2.0, 2.0), link_latency_us=1000.0, update_ms=0.5))
    assert spans(t, 1) == [(3, 5), (7.5, 9.5)]
    assert spans(t, 0, SpanKind.UPDATE) == [(6, 6.5), (10.5, 11)]


def test_stride_serves_two_steps_a_tick():
    # three ranks; step 0 exact (4 + 4), then two ticks of two steps
    t = predict(P.build(2, 2, 1, 5), Timing((4.0, 4.0), update_ms=1.0))
    assert t.total_ms == 9 + 2 * (4 + 2)
    assert t.sequential_ms == 45
    assert len(spans(t, 2)) == 2


def test_the_slowest_component_paces_the_others():
    # Step 0 takes 12 ms. Rank 1 then starts a run every 10 ms; rank 2 waits for the bundle of the
    # tick before: 12-13, 22-23, 32-33, 42-43, 52-53. What rank 1 still runs nobody reads.
    t = predict(P.build(3, 1, 1, 6), Timing((1.0, 10.0, 1.0)))
    assert [s[0] for s in spans(t, 2)[1:]] == [12, 22, 32, 42, 52]
    assert t.total_ms == 53 and spans(t, 1)[-1] == (52, 62)


def test_a_full_mailbox_holds_the_sender_back():
    # 1 GB/s and a bundle of 1 ms that could leave early: the slots (two) are given back at the
    # end of the tick that reads them, so no bundle leaves before the one two before was read.
    plan = P.build(3, 1, 1, 8)
    t = predict(plan, Timing((1.0, 10.0, 1.0), {(0, 2): 1_000_000}, link_gb_per_s=1.0))
    sent = spans(t, 0, SpanKind.EXCHANGE)
    read = [end for _, end in spans(t, 2)]  # run j (from the second) reads bundle j - 1
    for ordinal in range(2, len(sent)):
        assert sent[ordinal][0] >= read[ordinal - 1]


def test_no_links_n_equal_components_approach_n():
    for n in (2, 4, 8):
        t = predict(P.build(n, 1, 1, 2000), Timing((5.0 / n,) * n))
        assert n * 0.99 < t.speedup <= n


def test_warmup_equal_to_steps_is_sequential():
    t = predict(P.build(4, 1, 6, 6), Timing((1.0,) * 4, update_ms=0.25))
    assert t.total_ms == t.sequential_ms


@pytest.mark.parametrize(
    "timing",
    [
        Timing((1.0,)),
        Timing((1.0, -1.0)),
        Timing((1.0, math.nan)),
        Timing((1.0, 1.0), link_gb_per_s=0.0),
        Timing((1.0, 1.0), {(1, 0): 5}),
        Timing((1.0, 1.0), {(0, 1): 5}, {(0, 1): 6}),
        Timing((1.0, 1.0), update_ms=-1.0),
    ],
)
def test_costs_that_do_not_fit_are_refused(timing):
    with pytest.raises(PlanError):
        predict(P.build(2), timing)


def test_from_a_partition_report():
    report = {
        "components": [{"ms": 1.5}, {"ms": 2.5}],
        "boundaries": [{"source": 0, "target": 1, "bytes": 64, "tail_bytes": 16}],
    }
    timing = Timing.from_report(report, link_gb_per_s=300.0, update_ms=0.1)
    assert timing.component_ms == (1.5, 2.5)
    assert timing.boundary_bytes == {(0, 1): 64} and timing.tail_bytes == {(0, 1): 16}
    assert timing.link_gb_per_s == 300 and timing.update_ms == 0.1


def test_summary_and_dict_agree():
    t = predict(P.build(2, 2, 1, 6), Timing((1.0, 1.0)))
    assert f"{t.speedup:.2f} times" in summary(t)
    data = t.to_dict()
    assert data["speedup"] == t.speedup and len(data["ticks"]) == len(t.plan.ticks)
    assert data["ticks"][-1]["end_ms"] == t.total_ms


numbers = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 12))


@st.composite
def cases(draw):
    n, s, w, more = draw(numbers)
    tail = draw(st.integers(0, 2))
    plan = P.build(n, s, w, w + more + tail, exact_tail=tail)
    times = draw(st.lists(st.integers(1, 40), min_size=n, max_size=n))
    size = {(e.source, e.target): draw(st.integers(0, 50)) * 100_000 for e in plan.exchanges}
    tail = {pair: draw(st.integers(0, max(b, 0))) for pair, b in size.items()}
    timing = Timing(
        tuple(map(float, times)),
        size,
        tail,
        draw(st.sampled_from([0.5, 2.0, 25.0, math.inf])),
        float(draw(st.integers(0, 500))),
        draw(st.sampled_from([0.0, 0.5])),
    )
    return plan, timing


@settings(max_examples=150, deadline=None)
@given(cases())
def test_what_holds_for_every_plan(case):
    plan, timing = case
    t = predict(plan, timing)
    slack = 1e-6 * (1 + t.total_ms)
    # the critical path without links: exact steps one after another, then the slowest component
    # of every tick but the last, and every update
    exact = plan.warmup + plan.exact_tail
    ticks = len(plan.ticks) - exact
    path = exact * sum(timing.component_ms) + plan.steps * timing.update_ms
    last = timing.component_ms[-1] if ticks else 0.0
    assert t.total_ms >= path + last - slack
    slowest = max(timing.component_ms)
    assert t.total_ms >= exact * sum(timing.component_ms) + max(0, ticks - 1) * slowest - slack
    assert t.speedup <= plan.components * plan.stride + 1e-9
    assert all(0 <= b <= 1 for b in t.busy)
    assert 0 <= t.exposed_ms <= t.total_ms + slack
    # one thing at a time on each rank's queue and on its port; a run follows its plan's tick
    for rank in range(plan.ranks):
        for kinds in ({SpanKind.RUN, SpanKind.UPDATE}, {SpanKind.EXCHANGE}):
            mine = [s for s in t.of(rank) if s.kind in kinds]
            assert all(a.end_ms <= b.start_ms + slack for a, b in pairwise(mine))


@settings(max_examples=80, deadline=None)
@given(numbers, st.integers(0, 2), st.integers(1, 20), st.integers(1, 5))
def test_waves_of_equal_components_in_closed_form(args, tail, cost, delay):
    """An asynchronous tick costs one component's time as long as any wave is under way."""
    n, s, w, more = args
    late = min(delay, n - 1)
    plan = P.build(
        n, s, w, w + more + tail,
        schedule="wavefront", exact_tail=tail, delay=late or None,
    )  # fmt: skip
    t = predict(plan, Timing((float(cost),) * n, update_ms=0.5))
    busy = sum(bool(tick.runs) for tick in plan.ticks if not tick.exact)
    want = (w + tail) * n * cost + busy * cost + (w + more + tail) * 0.5
    ticks = math.ceil(more / s)
    if ticks >= 2 * late:
        assert t.total_ms == pytest.approx(want)
    assert t.total_ms <= want + 1e-6  # while only middle components work, nobody waits for them
    if ticks > late:
        assert busy == ticks


@settings(max_examples=80, deadline=None)
@given(cases(), st.integers(2, 5))
def test_slower_links_are_never_faster(case, factor):
    plan, timing = case
    if math.isinf(timing.link_gb_per_s):
        return
    slow = Timing(
        timing.component_ms, timing.boundary_bytes, timing.tail_bytes,
        timing.link_gb_per_s / factor, timing.link_latency_us * factor, timing.update_ms,
    )  # fmt: skip
    fast, slower = predict(plan, timing), predict(plan, slow)
    assert slower.total_ms >= fast.total_ms - 1e-6
    assert slower.exposed_ms >= fast.exposed_ms - 1e-6


@settings(max_examples=80, deadline=None)
@given(numbers, st.integers(1, 20))
def test_equal_components_without_links_in_closed_form(args, cost):
    n, s, w, more = args
    t = predict(P.build(n, s, w, w + more), Timing((float(cost),) * n, update_ms=0.5))
    assert t.total_ms == pytest.approx(w * n * cost + math.ceil(more / s) * cost + (w + more) * 0.5)


def test_a_stride_of_one_never_beats_the_number_of_ranks():
    for n in range(1, 9):
        t = predict(P.build(n, 1, 1, 50), Timing((1.0,) * n))
        assert t.speedup <= t.plan.ranks


def test_the_picture_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    t = predict(P.build(3, 2, 2, 12), Timing((2.0, 3.0, 2.5), {(0, 1): 9_000_000}, {}, 10.0))
    draw(t, tmp_path / "t.png")
    with image.open(tmp_path / "t.png") as picture:
        assert picture.format == "PNG" and picture.width > 800
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


def test_a_picture_of_waves_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    for steps in (1, 3, 12):
        plan = P.build(3, 2, 1, steps, schedule="wavefront")
        timing = Timing((2.0, 3.0, 2.5), {(0, 1): 9_000_000, (0, 2): 100}, {}, 10.0)
        draw(predict(plan, timing), tmp_path / f"{steps}.png")
        assert (tmp_path / f"{steps}.png").stat().st_size > 10_000


# --- golden files: the whole text and grid of a few plans, to be read and reviewed by people

GOLDEN = Path(__file__).parents[2] / "golden"
NUMBERS = [(1, 1, 1, 3), (2, 1, 1, 5), (2, 2, 1, 6), (3, 1, 2, 6), (3, 3, 2, 9), (4, 1, 4, 4)]


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("n,s,w,t", NUMBERS)
def test_golden_plans(n, s, w, t, shift):
    """After a change on purpose: run this file with ASYNCDIFF_UPDATE_GOLDEN=1."""
    plan = P.build(n, s, w, t, time_shift=shift)
    check_golden(plan, f"plan_N{n}_S{s}_w{w}_T{t}{'_shifted' if shift else ''}.txt")


@pytest.mark.parametrize("n,s,delay", [(2, 1, 1), (3, 1, 1), (3, 1, 2), (4, 2, 1)])
def test_golden_waves(n, s, delay):
    plan = P.build(n, s, 1, 8, schedule="wavefront", delay=delay, exact_tail=1)
    check_golden(plan, f"waves_N{n}_S{s}_delay{delay}.txt")


def test_waves_under_way_arrive_with_the_exact_step_that_follows_them():
    """At no cost: that step has to pass through all components anyway."""
    for n in (2, 3, 4):
        for tail in (0, 1, 2):
            plan = P.build(n, 1, 3, 20, schedule="wavefront", exact_tail=tail)
            ticks = n * (3 + tail) + 17 - tail
            assert predict(plan, Timing((10.0,) * n)).total_ms == pytest.approx(10.0 * ticks)


def check_golden(plan, name):
    path = GOLDEN / name
    text = plan_text.grid(plan) + "\n\n" + plan_text.to_text(plan)
    if os.environ.get("ASYNCDIFF_UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text
    assert plan_text.from_text(path.read_text().split("\n\n", 1)[1]) == plan


@pytest.mark.parametrize(("components", "microbatches"), [(2, 2), (2, 3), (3, 3), (4, 4), (3, 5)])
def test_a_pipeline_keeps_its_ranks_busy(components, microbatches):
    plan = P.build(components, steps=20, schedule="pipeline", microbatches=microbatches)
    timing = Timing((10.0,) * components)
    timeline = predict(plan, timing)
    # The first micro-batch fills the pipeline, the last one drains it; else nobody waits.
    ticks = 20 * microbatches + components - 1
    assert timeline.total_ms == pytest.approx(10.0 * ticks)
    assert timeline.sequential_ms == 10.0 * components * 20 * microbatches
    slow = predict(plan, replace(timing, update_ms=3.0))
    more = slow.total_ms - timeline.total_ms
    if microbatches > components:  # the sampler's work hides behind a further micro-batch
        assert more == pytest.approx(3.0)
    else:
        assert more == pytest.approx(20 * 3.0)


def test_too_few_micro_batches_leave_ranks_idle():
    plan = P.build(4, steps=20, schedule="pipeline", microbatches=1)
    assert predict(plan, Timing((10.0,) * 4)).speedup == pytest.approx(1.0)


def test_ranks_that_share_out_tokens_run_at_once() -> None:
    plan = P.build(2, steps=4, schedule="sequence")
    t = predict(plan, Timing((6.0, 6.5), update_ms=1.0, whole_ms=10.0))
    assert t.total_ms == 4 * 7.5 and t.sequential_ms == 4 * 11.0
    with pytest.raises(PlanError, match="exchange them inside of their runs"):
        predict(plan, Timing((6.0, 6.5), {(0, 1): 1}))
