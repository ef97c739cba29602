"""In what order a rank computes: what it gives to the others first."""

from __future__ import annotations

import pytest
import sequence
import torch
from torch import fx

from asyncdiff.partition.shards import shards
from asyncdiff.sequence.nodes import operation


@pytest.fixture(scope="module")
def program() -> fx.GraphModule:
    """Of rank 0 of two, of a tiny SD3."""
    captured, _, _ = sequence.of_family("SD3")

    def weight(name: str, device: torch.device) -> torch.Tensor:
        return captured.weights[name].to(device)

    return shards(captured, 2).program(0, torch.device("cpu"), weight)


def test_each_value_leaves_as_soon_as_it_exists(program: fx.GraphModule) -> None:
    """Keys before values are computed, and both before queries are."""
    nodes = list(program.graph.nodes)
    left = {n.args[:2]: i for i, n in enumerate(nodes) if n.target == "emit"}
    taken = {n.args[:2]: i for i, n in enumerate(nodes) if n.target == "meet"}
    assert len(left) == 7  # three attentions, and the result

    def products(begin: int, end: int) -> int:
        between = (n for n in nodes[begin:end] if n.op == "call_function")
        return sum(operation(n) in ("linear", "addmm", "mm") for n in between)

    for meeting in range(3):
        first, second = left[meeting, 0], left[meeting, 1]
        assert products(first, second) > 0
        assert products(second, taken[meeting, 0]) > 0


def test_tokens_are_the_outermost_dimension_of_what_attention_takes(
    program: fx.GraphModule,
) -> None:
    given = [n.args[2] for n in program.graph.nodes if n.target == "emit"]
    for value in given[:-1]:
        assert operation(value) == "permute"
        (moved,) = value.args[0].args[0].args[:1]
        assert operation(value.args[0]) == "clone" and isinstance(moved, fx.Node)
    assert operation(given[-1]) != "permute"
