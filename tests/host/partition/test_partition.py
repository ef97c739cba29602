"""Capture and partition: any cut recomposes to the denoiser, and the cut is the best one."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import toy, toy_call

from asyncdiff import PartitionError
from asyncdiff.graph.capture import Captured, capture
from asyncdiff.graph.program import run_program
from asyncdiff.graph.signature import Call, Role, parse
from asyncdiff.partition.balance import cut
from asyncdiff.partition.cost import estimate, measure
from asyncdiff.partition.links import Link, Links
from asyncdiff.partition.ownership import by_cuts, units
from asyncdiff.partition.partition import Partition, partition

CPU = torch.device("cpu")


@cache
def captured_toy() -> tuple[Captured, Call, torch.Tensor]:
    module = toy()
    call = parse(module, (), toy_call())
    return capture(module, call), call, module(**toy_call())[0]


def recompose(parts: Partition, call: Call) -> Any:
    """An exact step, component by component, each fed with fresh values."""
    box: dict[tuple[int, int], dict[int, torch.Tensor]] = {}
    out: list[Any] = []
    for j in parts.exact_order:
        component = parts.components[j]
        program = parts.program(j, CPU)
        args = [call.tensors[parts.captured.inputs[n.name]] for n in component.inputs]
        for boundary in component.reads:
            held = box.get((boundary.source, j), {})
            for i, value in enumerate(boundary.values):
                args.append(held.get(i, torch.full_like(value.meta["val"], torch.nan, device=CPU)))

        def hook(target: int, index: int, value: torch.Tensor, j: int = j) -> None:
            box.setdefault((j, target), {})[index] = value

        out = run_program(program, args, hook)
    return parts.captured.unflatten(out)


def test_roles_and_invariants() -> None:
    captured, call, _ = captured_toy()
    assert [x.role for x in call.signature.inputs] == [
        Role.LATENTS,
        Role.TIMESTEP,
        Role.CONDITIONING,
    ]
    # What does not depend on the latents never crosses, nor does a view.
    for node in captured.nodes:
        if captured.module_path(node) in ("time", "text"):
            assert not captured.ownable(node)
        if str(node.target) in ("aten.transpose.int", "aten.slice.Tensor"):
            assert not captured.ownable(node)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_cut_recomposes(data: st.DataObject) -> None:
    captured, call, want = captured_toy()
    names = [n.name for n in units(captured)]
    picks = data.draw(st.sets(st.integers(1, len(names) - 1), max_size=5))
    parts = partition(captured, len(picks) + 1, tuple(names[p] for p in sorted(picks)))
    assert parts.exact_order == tuple(range(len(picks) + 1))
    for boundary in parts.boundaries.values():
        assert boundary.source < boundary.target
        assert all(captured.ownable(v) for v in boundary.values)
    assert torch.equal(recompose(parts, call)[0], want)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_split_by_modules_recomposes(data: st.DataObject) -> None:
    """Also with circles, unlisted glue and modules in odd places."""
    captured, call, want = captured_toy()
    paths = ["enter", "down.0", "down.1", "down.2", "mix", "up.0", "up.1", "up.2"]
    count = data.draw(st.integers(2, 3))
    split: list[list[str]] = [[] for _ in range(count)]
    split[-1].append("leave")
    for path in paths:
        where = data.draw(st.integers(-1, count - 1))
        if where >= 0:
            split[where].append(path)
    if not all(split):
        return
    try:
        parts = partition(captured, count, split)
    except PartitionError as e:
        # Components that own nothing of use, or nothing but what waits for itself, are refused.
        assert "owns nothing" in str(e) or "computes nothing" in str(e)
        return
    assert torch.equal(recompose(parts, call)[0], want)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_automatic_split_recomposes(count: int) -> None:
    captured, call, want = captured_toy()
    for costs in (estimate(captured), measure(captured, call.tensors, CPU)):
        parts = partition(captured, count, "auto", costs=costs)
        assert torch.equal(recompose(parts, call)[0], want)
        report = parts.report()
        data = report.to_dict()
        assert len(data["components"]) == count
        each_time = sum(m for n, m in costs.macs.items() if captured.each_run(n))
        assert sum(c["macs"] for c in data["components"]) >= each_time
        # What is computed ahead counts for no component, though some have its nodes.
        assert count > 1 or data["components"][0]["macs"] == each_time < sum(costs.macs.values())
        assert all(c["ms"] >= 0 and c["nodes"] > 0 for c in data["components"])
        assert str(report).count("\n") >= count
        # The cuts that are reported make the same partition again.
        again = partition(captured, count, parts.cuts) if count > 1 else parts
        assert [c.nodes for c in again.components] == [c.nodes for c in parts.components]


def test_macs_are_those_of_the_formulas() -> None:
    captured, _, _ = captured_toy()
    macs = estimate(captured).macs
    (enter,) = (
        n for n in captured.nodes if captured.module_path(n) == "enter" and "conv" in str(n.target)
    )
    assert macs[enter] == 2 * 8 * 8 * 8 * 4 * 9  # batch, H, W, out, in, kernel


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_cut_is_the_best_of_all(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 9))
    numbers = st.lists(st.integers(0, 50), min_size=count, max_size=count)
    ms, nbytes = data.draw(numbers), data.draw(numbers)
    last_use = [data.draw(st.integers(i, count)) for i in range(count)]
    parts = data.draw(st.integers(1, min(count, 4)))
    copies = data.draw(st.integers(1, 3))
    # From each rank to the next one: bytes a millisecond, and milliseconds of latency.
    each = st.builds(Link, st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([0.0, 4.0]))
    pairs = {(i, i + 1): data.draw(each) for i in range(parts - 1)}
    links = Links(Link(5.0), pairs)

    def cost(a: int, b: int, i: int) -> float:
        """Naive: push in order of production on one link, beside the computation."""
        link = links.from_component(i, parts, copies)
        clock = port = there = 0.0
        for v in range(a, b):
            clock += ms[v]
            if last_use[v] >= b and nbytes[v]:
                port = max(port, clock) + nbytes[v] / link.bytes_per_ms
                there = port + link.latency_ms
        crossing = sum(nbytes[v] for v in range(a, b) if last_use[v] >= b)
        return max(clock, there) + 0.02 * crossing / link.bytes_per_ms

    def slowest(starts: tuple[int, ...]) -> float:
        edges = [0, *starts, count]
        return max(cost(a, b, i) for i, (a, b) in enumerate(itertools.pairwise(edges)))

    best = min(slowest(c) for c in itertools.combinations(range(1, count), parts - 1))
    got = cut(ms, nbytes, last_use, parts, links, copies)
    assert got is not None
    assert slowest(tuple(got)) == pytest.approx(best)


def test_too_many_components() -> None:
    captured, _, _ = captured_toy()
    limit = len(units(captured))
    with pytest.raises(PartitionError, match=f"at most {limit}"):
        partition(captured, limit + 1)


def test_cuts_of_another_denoiser() -> None:
    captured, _, _ = captured_toy()
    with pytest.raises(PartitionError, match=r"handle\.partition\.cuts"):
        by_cuts(captured, ["no_such_node"])


@pytest.mark.slow
def test_sd_structure_splits_by_modules_without_invariants() -> None:
    spec = reference.case("sd21_ddim_n3s1w2")
    unet = reference.denoiser(spec["denoiser"])
    kwargs = {
        "sample": torch.randn(2, 4, 16, 16),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "return_dict": False,
    }
    call = parse(unet, (), kwargs)
    captured = capture(unet, call)
    parts = partition(captured, 3, spec["split"])
    assert torch.equal(recompose(parts, call)[0], unet(**kwargs)[0])
    for boundary in parts.boundaries.values():
        assert all(v in captured.variant and v not in captured.views for v in boundary.values)
