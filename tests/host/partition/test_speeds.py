"""Components on devices of unequal speed: the cut, its times, and what is said of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Toy, toy_call

from asyncdiff import InputError, ParallelConfig
from asyncdiff.graph.capture import Captured, capture
from asyncdiff.graph.signature import parse
from asyncdiff.partition.balance import cut
from asyncdiff.partition.cost import Costs
from asyncdiff.partition.links import Links
from asyncdiff.partition.partition import partition
from asyncdiff.partition.speeds import at_speeds, on_kinds, runners, slower

FAST = Links.alike(1e12)  # bytes a millisecond: what crosses takes no time


def deep(depth: int = 40) -> tuple[Captured, Costs]:
    """Many layers, of which every node takes a millisecond."""
    torch.manual_seed(0)
    module = Toy(depth=depth).double().eval().requires_grad_(False)
    captured = capture(module, parse(module, (), toy_call()))
    ms = {n: 0.0 if n in captured.views else 1.0 for n in captured.nodes}
    return captured, Costs(ms, dict.fromkeys(captured.nodes, 0), "measured on a GPU")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_cut_is_the_best_of_all(data: st.DataObject) -> None:
    """Where each component's device has times of its own."""
    count, parts = data.draw(st.integers(3, 8)), data.draw(st.integers(2, 3))
    numbers = st.lists(st.integers(0, 50), min_size=count, max_size=count)
    each = [data.draw(numbers) for _ in range(parts)]
    last = list(range(count))

    def slowest(starts: tuple[int, ...]) -> float:
        edges = [0, *starts, count]
        return max(sum(each[i][a:b]) for i, (a, b) in enumerate(itertools.pairwise(edges)))

    best = min(slowest(c) for c in itertools.combinations(range(1, count), parts - 1))
    got = cut([0.0] * count, [0] * count, last, parts, Links.alike(1.0), 1, each)
    assert got is not None
    assert slowest(tuple(got)) == best


@pytest.mark.parametrize("speeds", [[1.0, 0.6], [0.6, 1.0], [1.0, 0.5, 0.75], [3.0, 5.0]])
def test_components_take_as_long_as_each_other(speeds: list[float]) -> None:
    """At least 0.95 of the ideal, which is the sum of the speeds."""
    captured, costs = deep()
    count = len(speeds)
    each = at_speeds(costs, speeds, runners(count, 1, count))
    parts = partition(captured, count, costs=each, links=FAST)
    alone = partition(captured, 1, costs=costs).report().components[0].ms
    ideal = alone / (sum(speeds) / speeds[0])
    report = parts.report()
    assert max(c.ms for c in report.components) <= ideal / 0.95
    # Equal halves would be far from that.
    equal = partition(captured, count, costs=costs, links=FAST)
    equal.costs = each
    assert max(c.ms for c in equal.report().components) > ideal / 0.9
    assert report.speeds == pytest.approx([s / max(speeds) for s in speeds], rel=1e-3)
    assert "at 100 %" in str(report) and report.to_dict()["speeds"] == report.speeds


def test_equal_speeds_change_nothing() -> None:
    captured, costs = deep(6)
    assert at_speeds(costs, [2, 2, 2], runners(2, 2, 3)) is costs
    both = {"A": costs, "B": costs}
    assert on_kinds(both, "A", [["A"], ["A"]]).each == ()
    report = partition(captured, 2, costs=costs).report()
    assert report.speeds == [1.0, 1.0] and "speeds" not in str(report)


def test_the_slowest_of_a_components_ranks_counts() -> None:
    """Copies of the last component, for a stride, and the ranks of the other condition."""
    assert runners(2, 1, 2) == [[0], [1]]
    assert runners(2, 2, 3) == [[0], [1, 2]]
    assert runners(2, 2, 6) == [[0, 3], [1, 2, 4, 5]]
    _, costs = deep(3)
    slow = Costs(slower(costs.ms, 2.0), costs.macs, "measured on B")
    found = on_kinds({"A": costs, "B": slow}, "A", [["A", "A"], ["A", "B"]])
    assert found.on(0) is costs.ms and found.on(1) is slow.ms
    assert found.source == "measured on a GPU; measured on B"
    last = at_speeds(costs, [1, 1, 0.5], runners(2, 2, 3))
    assert last.on(1) == slow.ms and last.on(0) == costs.ms


@pytest.mark.parametrize("speeds", [[], [1, 0], [1, -1], ["fast"], 3, [float("inf"), 1], "12"])
def test_what_are_no_speeds(speeds: object) -> None:
    with pytest.raises(InputError, match=r"one positive number a rank, as \[1, 0.6\]"):
        ParallelConfig(speeds=speeds)  # type: ignore[arg-type]
