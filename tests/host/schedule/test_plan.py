"""Plans: every step served once, nothing read before it is made or after its slot is reused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdiff.errors import PlanError
from asyncdiff.schedule import plan as P
from asyncdiff.schedule import text as plan_text

numbers = st.tuples(
    st.integers(1, 6), st.integers(1, 5), st.integers(1, 6), st.integers(0, 20), st.booleans()
)


def make(args, **kwargs):
    n, s, w, more, shift = args
    tail = kwargs.get("exact_tail", 0)
    return P.build(n, s, w, w + more + tail, time_shift=shift, **kwargs)


def wave(args, **kwargs):
    return make((*args[:4], False), schedule="wavefront", **kwargs)


def simulate(plan):
    """Walk the actions as issued, with slots that hold ordinals, and check every rule."""
    waves = plan.schedule == "wavefront"
    held = 2 if plan.extrapolate else 1
    wave_of = {}  # (component, ordinal) -> the step and the tick at which it was made
    slots = {}  # (source, receiving rank) -> slot -> ordinal
    got, freed, puts = {}, {}, dict.fromkeys(range(plan.components), 0)
    served = []
    for tick in plan.ticks:
        before = dict(puts)
        for a in tick.actions:
            key = (a.component, a.rank)
            if a.ordinal >= 0:
                assert a.slot == a.ordinal % plan.slots
            if a.kind is P.Kind.GET:
                assert a.ordinal == got.get(key, 0)
                got[key] = got.get(key, 0) + 1
                assert got[key] <= puts[a.component], "taken before it was sent"
            elif a.kind is P.Kind.RELEASE:
                assert a.ordinal == freed.get(key, 0)
                freed[key] = freed.get(key, 0) + 1
                assert freed[key] <= got.get(key, 0), "given back before it was taken"
            else:
                assert a.component == plan.component_of(a.rank)
                for source, ordinal, slot in a.reads:
                    assert slot == max(ordinal, 0) % plan.slots
                    if ordinal < 0:
                        continue
                    k = (source, a.rank)
                    assert freed.get(k, 0) <= ordinal < got[k], "read while not held"
                    assert slots[k][ordinal % plan.slots] == ordinal, "slot reused"
                    if waves:
                        step, made = wave_of[source, ordinal]
                        lag = next(
                            e.lag for e in plan.exchanges
                            if (e.source, e.target) == (source, a.component)
                        )  # fmt: skip
                        late = [min(c, plan.delay) for c in (source, a.component)]
                        own = tick.exact and a.latents in tick.serves  # not a wave under way
                        together = late[0] == late[1] and not own
                        assert a.latents == a.time
                        if together:  # the wave before: the first ones found it in an exact step
                            assert step < a.latents, "a value of the wave itself, too early"
                            assert wave_of[source, ordinal + 1] == (a.latents, tick.index)
                        else:
                            assert step == a.latents, "a value of another wave"
                        was_exact = plan.ticks[made].exact
                        assert tick.exact or (was_exact and together) or tick.index - made == lag
                    elif not tick.exact:
                        assert before[source] - held <= ordinal < before[source]
                if not waves:
                    newest = {}
                    for source, ordinal, _ in a.reads:
                        newest.setdefault(source, []).append(ordinal)
                    for source, ordinals in newest.items():
                        if not tick.exact:
                            top = before[source] - 1
                            assert ordinals == [top, top - 1][: min(held, top + 1)]
                        assert len(ordinals) <= held
                wave_of[a.component, a.ordinal] = a.latents, tick.index
                if a.ordinal >= 0:
                    assert a.ordinal == puts[a.component]
                    puts[a.component] += 1
                    for e in plan.exchanges:
                        if e.source == a.component:
                            for rank in plan.ranks_of(e.target):
                                k = (e.source, rank)
                                assert a.ordinal - freed.get(k, 0) < plan.slots, "no credit"
                                slots.setdefault(k, {})[a.ordinal % plan.slots] = a.ordinal
                if a.step is not None:
                    served.append(a.step)
                    assert waves or a.step in tick.serves
        if not tick.exact:
            assert len({a.rank for a in tick.runs}) == len(tick.runs)
    assert [k for t in plan.ticks for k in t.serves] == list(range(plan.steps))
    if waves:
        assert served == sorted(set(served))
    else:
        assert sorted(served) == list(range(plan.steps)), "every step from exactly one run"
    for k in got:
        assert got[k] == freed[k] == puts[k[0]], "channels end empty"


@given(numbers)
@settings(max_examples=300, deadline=None)
def test_rules(args):
    simulate(make(args))


@given(numbers.filter(lambda a: a[0] == 2))
@settings(max_examples=50, deadline=None)
def test_rules_in_a_circle(args):
    both = (P.Exchange(0, 1), P.Exchange(1, 0))
    plan = make(args, exchanges=both, exact_order=(1, 0, 1))
    simulate(plan)
    for tick in plan.ticks:
        if tick.exact:
            last = tick.runs[-1]
            assert last.component == 1 and last.step is not None


@given(numbers, st.integers(1, 4), st.booleans())
@settings(max_examples=200, deadline=None)
def test_rules_with_an_exact_tail_and_extrapolation(args, tail, extrapolate):
    plan = make(args, exact_tail=tail, extrapolate=1.0 if extrapolate else 0.0)
    simulate(plan)
    assert [t.exact for t in plan.ticks[-tail:]] == [True] * tail
    assert plan.slots == (3 if extrapolate else 2)


@given(numbers, st.integers(0, 4), st.integers(1, 5))
@settings(max_examples=300, deadline=None)
def test_rules_of_waves(args, tail, delay):
    n, s, w, more, _ = args
    delay = min(delay, n - 1)
    plan = wave(args, exact_tail=tail, delay=delay or None)
    simulate(plan)
    assert plan.ranks == n and plan.slots == max(2, delay + 1) and plan.delay == delay
    if delay == n - 1:  # nothing is stale
        assert all(e.lag == e.target - e.source for e in plan.exchanges)
    # A wave starts every S steps, and is done after the delay; what would not be is not started.
    starts = list(range(w, w + more, s))
    done = [k for t in plan.ticks if not t.exact for k in t.delivers]
    assert done == starts[: max(0, len(starts) - delay)]
    if tail:  # what is under way is done in the first exact step
        under_way = starts[max(0, len(starts) - delay) :]
        assert plan.ticks[-tail].delivers == (*under_way, w + more)
    first = w  # the tick at which the first wave starts
    for tick in plan.ticks:
        if not tick.exact and tick.delivers:
            assert tick.delivers == (starts[tick.index - first - delay],)
    assert all(t.serves for t in plan.ticks)


@pytest.mark.parametrize("edges", [P.chain(4), [P.Exchange(1, 2), P.Exchange(2, 3)]])
def test_nothing_inside_a_wave_is_stale_by_default(edges):
    plan = P.build(4, 1, 1, 9, schedule="wavefront", exchanges=edges)
    assert plan.delay == 3
    assert all(e.lag == e.target - e.source for e in plan.exchanges)


def test_waves_that_are_all_exact_are_the_published_plan_but_for_the_rings():
    for n in range(1, 5):
        waves, published = wave((n, 1, 4, 0)), P.build(n, 1, 4, 4)
        runs = [[(a.component, a.latents, a.time, a.step) for a in t.runs] for t in waves.ticks]
        assert runs == [
            [(a.component, a.latents, a.time, a.step) for a in t.runs] for t in published.ticks
        ]


@given(numbers, st.integers(0, 3), st.sampled_from(["plain", "wave", "extrapolate"]))
@settings(max_examples=150, deadline=None)
def test_text_and_json_round_trip(args, tail, kind):
    if kind == "extrapolate":
        plan = make(args, exact_tail=tail, extrapolate=0.5)
    elif kind == "plain":
        plan = make(args, exact_tail=tail)
    else:
        late = args[0] - 1 if args[0] > 1 and args[1] % 2 else None
        plan = wave(args, exact_tail=tail, delay=late)
    assert plan_text.from_text(plan_text.to_text(plan)) == plan
    assert plan_text.from_json(plan_text.to_json(plan)) == plan


def test_published_times():
    """S=2: the lead time is one later, the copy's own; the last odd step is the copy's alone."""
    plan = P.build(2, 2, 1, 4)
    tick = plan.ticks[1]
    assert [(a.rank, a.latents, a.time, a.step) for a in tick.runs] == [
        (0, 1, 2, None),
        (1, 1, 2, 2),
        (2, 1, 1, 1),
    ]
    assert [(a.rank, a.time, a.step) for a in plan.ticks[2].runs] == [(2, 3, 3)]
    shifted = P.build(2, 2, 1, 4, time_shift=True)
    assert [a.time for a in shifted.ticks[1].runs] == [1, 1, 0]
    assert [a.time for a in shifted.ticks[0].runs] == [0, 0]


def test_grid():
    assert plan_text.grid(P.build(2, 2, 1, 5)) == (
        "steps          |  x0 1,2 3,4\n"
        "rank 0 C0      |  t0  t2  t4\n"
        "rank 1 C1      | t0* t2* t4*\n"
        "rank 2 C1 copy |     t1* t3*"
    )


@pytest.mark.parametrize("width", [40, 60, 75])
def test_a_narrow_grid_goes_on_below(width):
    plan = P.build(3, 2, 2, 60)
    whole = plan_text.grid(plan).splitlines()
    blocks = [b.splitlines() for b in plan_text.grid(plan, width).split("\n\n")]
    left = whole[0].index("|") + 1
    assert len(blocks) > 1 and {len(b) for b in blocks} == {len(whole)}
    assert all(len(line) <= width for b in blocks for line in b)
    for i, line in enumerate(whole):  # every block has the names; together they are the whole
        assert {b[i][:left] for b in blocks} == {line[:left]}
        assert "".join(b[i][left:] for b in blocks) == line[left:]
    assert plan_text.grid(plan, 1000) == plan_text.grid(plan)


def test_grid_of_waves():
    numbers = {"schedule": "wavefront", "exact_tail": 1}
    assert plan_text.grid(P.build(3, 1, 1, 6, delay=1, **numbers)) == (
        "steps     |  x0  1   2   3   4      x5\n"
        "rank 0 C0 |  t0 t1  t2  t3  t4      t5\n"
        "rank 1 C1 |  t0     t1  t2  t3   t4 t5\n"
        "rank 2 C2 | t0*    t1* t2* t3* t4* t5*"
    )
    assert plan_text.grid(P.build(3, 1, 1, 6, **numbers)) == (
        "steps     |  x0  1  2   3   4          x5\n"
        "rank 0 C0 |  t0 t1 t2  t3  t4          t5\n"
        "rank 1 C1 |  t0    t1  t2  t3       t4 t5\n"
        "rank 2 C2 | t0*       t1* t2* t3* t4* t5*"
    )


@pytest.mark.parametrize(
    "options, words",
    [
        ({"schedule": "waves"}, "write one of asyncdiff, wavefront"),
        ({"schedule": "wavefront", "time_shift": True}, "time_shift belongs"),
        ({"schedule": "wavefront", "extrapolate": 1.0}, "extrapolate belongs"),
        ({"extrapolate": 3.0}, "0 .off. to 2"),
        ({"delay": 1}, "delay belongs"),
        ({"schedule": "wavefront", "delay": 2}, "after 1 to 1 ticks"),
        ({"schedule": "wavefront", "delay": 0}, "after 1 to 1 ticks"),
        ({"exact_tail": -1}, "exact_tail must be"),
        ({"exact_tail": 5}, "exact_tail <= 4"),
        (
            {
                "schedule": "wavefront",
                "exchanges": [P.Exchange(1, 0)],
            },
            "comes after it",
        ),
        (
            {
                "extrapolate": 1.0,
                "exchanges": [P.Exchange(0, 1), P.Exchange(1, 0)],
                "exact_order": (1, 0, 1),
            },
            "circle",
        ),
    ],
)
def test_options_that_no_plan_has(options, words):
    with pytest.raises(PlanError, match=words):
        P.build(2, 1, 1, 5, **options)


@pytest.mark.parametrize(
    "args, words",
    [
        ((0, 1, 1, 5), "components"),
        ((2, 0, 1, 5), "stride"),
        ((2, 1, 0, 5), "warmup"),
        ((2, 1, 6, 5), "warmup <= 5"),
        ((2, 1, 1, 0), "steps"),
        ((2.0, 1, 1, 5), "components"),
    ],
)
def test_bad_numbers(args, words):
    with pytest.raises(PlanError, match=words):
        P.build(*args)


@pytest.mark.parametrize("text", ["", "plan", "plan N=2", "hello\nworld"])
def test_bad_text(text):
    with pytest.raises(PlanError):
        plan_text.from_text(text)
    with pytest.raises(PlanError):
        plan_text.from_json(text)


@pytest.mark.parametrize(("components", "microbatches"), [(1, 1), (2, 2), (3, 4)])
def test_a_pipelines_micro_batches_take_turns(components, microbatches):
    plan = P.build(components, steps=3, schedule="pipeline", microbatches=microbatches)
    assert plan.ranks == components
    assert [(t.serves, t.microbatch) for t in plan.ticks] == [
        ((k,), m) for k in range(3) for m in range(microbatches)
    ]
    alone = P.build(components, warmup=3, steps=3)
    for m in range(microbatches):  # each is what exact steps of the published schedule are
        mine = [t.actions for t in plan.ticks if t.microbatch == m]
        assert mine == [t.actions for t in alone.ticks]
    assert plan_text.from_text(plan_text.to_text(plan)) == plan
    assert plan_text.from_json(plan_text.to_json(plan)) == plan


@pytest.mark.parametrize("microbatches", [0, 1.5, True])
def test_micro_batches_are_counted(microbatches):
    with pytest.raises(PlanError, match="microbatches must be a whole number"):
        P.build(2, schedule="pipeline", microbatches=microbatches)
    with pytest.raises(PlanError, match="microbatches belong to schedule='pipeline'"):
        P.build(2, microbatches=2)
