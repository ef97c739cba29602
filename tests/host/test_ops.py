"""Channels as operators of torch: what compiled code exchanges, and how they are declared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import group_ops
import pytest
import torch
from group import run

import asyncdiff_core as core
from asyncdiff import InputError, ops

LAYOUT = core.Layout([core.TensorSpec("float32", (3, 2)), core.TensorSpec("int64", (4,))])


def bundle(n: int) -> list[torch.Tensor]:
    return [torch.full((3, 2), float(n)), torch.arange(4) + n]


@pytest.fixture
def channel() -> Iterator[core.Channel]:
    """From rank 0 to rank 1 of one process."""
    fabric = core.HostFabric(2, deadline=5)
    made = fabric.channel(0, [1], LAYOUT, slots=2)
    ops.register("way", made)
    yield made
    ops.unregister("way")
    fabric.close()


@pytest.mark.slow
def test_compiled_code_of_two_processes(tmp_path: Path) -> None:
    """Whole graphs, in their order; compiled for the first slot, and once more for any."""
    for wrong, counts in run(group_ops.exchange, 2, tmp_path):
        assert wrong < 1e-5
        assert counts[0] == 1 and counts[1] <= 2 and counts[1:] == counts[1:2] * (len(counts) - 1)


def test_eager(channel: core.Channel) -> None:
    kept = []
    for n in range(6):
        ops.put("way", bundle(n), n % 2)
        kept.append(ops.get("way", 1, n % 2))
        ops.release("way", 1, n % 2)
    for n, tensors in enumerate(kept):  # they are copies
        assert all(torch.equal(a, b) for a, b in zip(tensors, bundle(n), strict=True))


def test_none_is_left_out_or_moved(channel: core.Channel) -> None:
    """Results that nobody uses, and operators without results."""

    def work(x: torch.Tensor) -> torch.Tensor:
        for n in range(4):
            ops.put("way", [x * n, torch.arange(4)], n % 2)
            got = ops.get("way", 1, n % 2)
            ops.release("way", 1, n % 2)
        return got[0]

    x = torch.randn(3, 2)
    assert torch.equal(torch.compile(work, fullgraph=True, backend="aot_eager")(x), x * 3)
    kinds: list[str] = []
    torch._dynamo.reset()

    def look(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        targets = (n.target for n in graph.graph.nodes if n.op == "call_function")
        kinds.extend(x.__name__ for x in targets if "asyncdiff" in str(x))
        return graph

    torch.compile(work, fullgraph=True, backend=look)(x)
    assert [k for k in kinds if k != "empty"] == ["put", "get", "release"] * 4, kinds


def test_what_operators_declare(channel: core.Channel) -> None:
    """torch's own check; it calls operators often, so these reach a channel that never waits."""
    nothing: Any = lambda *_: None  # noqa: E731
    still = SimpleNamespace(
        layout=LAYOUT, slot=channel.slot, put=nothing, get=nothing, release=nothing
    )
    ops.register("still", still)  # type: ignore[arg-type]
    for name, arguments in (
        ("put", (ops.ORDER, bundle(1), "still", 0)),
        ("empty", ("still", 1)),
        ("get", (ops.ORDER, bundle(1), "still", 1, 0)),
        ("release", (ops.ORDER, "still", 1, 0)),
    ):
        operator = getattr(torch.ops.asyncdiff, name).default
        checks = ["test_schema", "test_faketensor", "test_autograd_registration"]
        if name != "empty":  # which has other values each time
            checks += ["test_aot_dispatch_static", "test_aot_dispatch_dynamic"]
        found = torch.library.opcheck(operator, arguments, test_utils=checks)
        assert set(found.values()) == {"SUCCESS"}, (name, found)
    ops.unregister("still")


def test_what_is_wrong_is_said(channel: core.Channel) -> None:
    with pytest.raises(InputError, match="there is a channel 'way' already"):
        ops.register("way", channel)
    for call in (
        lambda: ops.put("weg", bundle(0), 0),
        lambda: ops.get("weg", 1, 0),
        lambda: ops.release("weg", 1, 0),
        lambda: ops.unregister("weg"),
    ):
        with pytest.raises(InputError, match=r"no channel is called 'weg'.*there are: 'way'"):
            call()
    with pytest.raises(core.InvalidArgument, match="1 tensors for channel"):
        ops.put("way", bundle(0)[:1], 0)
    with pytest.raises(core.InvalidArgument, match="but"):
        ops.put("way", [bundle(0)[0].double(), bundle(0)[1]], 0)
    with pytest.raises(core.SlotOrderError):
        ops.put("way", bundle(0), 1)
