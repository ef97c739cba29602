"""What nodes are measured to cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode

from asyncdiff.graph.capture import Captured, capture
from asyncdiff.graph.signature import parse
from asyncdiff.partition import cost
from asyncdiff.partition.cost import _forget, _runs, count_macs, estimate, measure
from asyncdiff.partition.timing import milliseconds
from asyncdiff.preparation import cuts
from asyncdiff.preparation.cuts import of_nodes


class Model(nn.Module):
    """A chain with a value that is read again at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        skip = self.first(x) * t
        return self.second(skip.exp().sin()) + skip


def _captured(x: torch.Tensor, t: torch.Tensor) -> tuple[Captured, Any]:
    module = Model()
    call = parse(module, (x, t), {})
    return capture(module, call), call.tensors


def test_every_node_has_a_cost() -> None:
    captured, tensors = _captured(torch.randn(2, 8), torch.tensor(3.0))
    costs = measure(captured, tensors, torch.device("cpu"))
    assert set(costs.ms) == set(captured.nodes)
    assert all(ms >= 0 for ms in costs.ms.values())
    assert costs.source == "measured on CPU"


def test_what_nodes_say_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    captured, _ = _captured(torch.randn(2, 8), torch.tensor(3.0))
    other, _ = _captured(torch.randn(3, 8), torch.tensor(3.0))
    costs, word = estimate(captured), of_nodes(captured)
    monkeypatch.setattr(cost, "count_macs", None)
    monkeypatch.setattr(cuts, "digest", None)
    assert estimate(captured) is costs and of_nodes(captured) == word
    with pytest.raises(TypeError):
        estimate(other)
    with pytest.raises(TypeError):
        of_nodes(other)


class Watch(TorchDispatchMode):
    """Whether there are hooks of all modules while operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        hooks = torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks
        self.seen.append(any(hooks))
        return func(*args, **kwargs or {})


def test_counting_is_nothing_that_other_threads_see() -> None:
    """A pipeline that begins in another thread is refused where all modules have a hook."""
    captured, _ = _captured(torch.randn(2, 8), torch.tensor(3.0))
    with Watch() as watch:
        macs = count_macs(captured)
    assert watch.seen and not any(watch.seen)
    assert sorted(macs.values())[-3:] == [0, 2 * 8 * 8, 2 * 8 * 8]


def test_values_live_no_longer_than_they_are_read() -> None:
    """Else measured nodes would find their memory out of the cache more often than in a loop."""
    captured, tensors = _captured(torch.randn(2, 8), torch.tensor(3.0))
    cpu = torch.device("cpu")
    inputs = {
        node: tensors[captured.inputs[node.name]]
        for node in captured.graph.nodes
        if node.op == "placeholder" and node.name in captured.inputs
    }
    weights = {
        node: captured.weights[node.name]
        for node in captured.graph.nodes
        if node.op == "placeholder" and node.name in captured.weights
    }
    values: dict[Any, Any] = dict(inputs)
    last_reader = {s: n for n in captured.nodes for s in n.all_input_nodes}
    halves = captured.nodes[:3], captured.nodes[3:]
    for half in halves:
        values |= weights
        runs = _runs(half, values, last_reader, cpu)
        most = 0
        for _ in range(2):  # a second pass finds all that it reads
            for run in runs:
                run()
                most = max(most, len(values))
        # What is read again and the last value, also of the pass before.
        assert most <= len(inputs) + len(weights) + 3
        _forget(captured, half, values, last_reader)
        assert not set(weights) & set(values)
    assert not [n for n in values if n in captured.nodes]


class Layers(nn.Module):
    """Many layers that are alike, and between them a wider one."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.ModuleList(nn.Linear(8, 8) for _ in range(60))
        self.wide = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, layer in enumerate(self.narrow):
            x = layer(x).sigmoid()
            if i == 40:
                x = self.wide(x)
        return x


def test_layers_that_are_alike_are_timed_at_a_few_places(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = Layers(), torch.randn(2, 8)
    call = parse(module, (x,), {})
    captured = capture(module, call)
    timed: list[int] = []

    def counted(work: Sequence[Any], device: torch.device) -> list[float]:
        timed.append(len(work))
        return milliseconds(work, device)

    monkeypatch.setattr(cost, "milliseconds", counted)
    monkeypatch.setattr(cost, "_FOLLOWING", 8)
    costs = measure(captured, call.tensors, torch.device("cpu"))
    assert set(costs.ms) == set(captured.nodes)
    assert sum(timed) / cost._PASSES < 80  # of 124 nodes
    each = [n for n in captured.nodes if "linear" in str(n.target)]
    narrow = [costs.ms[n] for n in each if n.meta["val"].shape == (2, 8)][1:40]
    assert len(set(narrow)) == 1 and len({costs.ms[n] for n in each}) > 1


def test_what_other_shapes_or_arguments_have_is_timed() -> None:
    """Also views that make the same values lie otherwise, and what another dimension is reduced."""

    class Other(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x.softmax(0), x.softmax(1), x.t().softmax(1), x.double().softmax(1)

    module = Other()
    call = parse(module, (torch.randn(4, 4),), {})
    captured = capture(module, call)
    alike = [k for n, k in cost._alike(captured).items() if "softmax" in str(n.target)]
    assert len(alike) == len(set(alike)) == 4
