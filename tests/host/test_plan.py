"""Plans: every step served once, nothing read before it is made or after its slot is reused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdiff import plan as P
from asyncdiff import plan_text
from asyncdiff.errors import PlanError

numbers = st.tuples(
    st.integers(1, 6), st.integers(1, 5), st.integers(1, 6), st.integers(0, 20), st.booleans()
)


def make(args, **kwargs):
    n, s, w, more, shift = args
    return P.build(n, s, w, w + more, time_shift=shift, **kwargs)


def simulate(plan):
    """Walk the actions as issued, with slots that hold ordinals, and check every rule."""
    slots = {}  # (source, receiving rank) -> slot -> ordinal
    got, freed, puts = {}, {}, dict.fromkeys(range(plan.components), 0)
    served = []
    for tick in plan.ticks:
        before = dict(puts)
        for a in tick.actions:
            key = (a.component, a.rank)
            if a.kind is P.Kind.GET:
                got[key] = got.get(key, 0) + 1
                assert got[key] <= puts[a.component], "taken before it was sent"
            elif a.kind is P.Kind.RELEASE:
                freed[key] = freed.get(key, 0) + 1
                assert freed[key] <= got.get(key, 0), "given back before it was taken"
            else:
                assert a.component == plan.component_of(a.rank)
                for source, ordinal in a.reads:
                    if ordinal < 0:
                        continue
                    k = (source, a.rank)
                    assert freed.get(k, 0) <= ordinal < got[k], "read while not held"
                    assert slots[k][ordinal % plan.slots] == ordinal, "slot reused"
                    if not tick.exact:
                        assert ordinal == before[source] - 1, "not the previous tick's value"
                if a.put is not None:
                    assert a.put == puts[a.component]
                    puts[a.component] += 1
                    for e in plan.exchanges:
                        if e.source == a.component:
                            for rank in plan.ranks_of(e.target):
                                k = (e.source, rank)
                                assert a.put - freed.get(k, 0) < plan.slots, "no credit"
                                slots.setdefault(k, {})[a.put % plan.slots] = a.put
                if a.step is not None:
                    served.append(a.step)
                    assert a.step in tick.serves
        if not tick.exact:
            assert len({a.rank for a in tick.runs}) == len(tick.runs)
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


@given(numbers)
@settings(max_examples=100, deadline=None)
def test_text_and_json_round_trip(args):
    plan = make(args)
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
