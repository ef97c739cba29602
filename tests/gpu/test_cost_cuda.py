"""What nodes are measured to cost on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import reference
import torch
from torch import nn

from asyncdiff.graph.capture import capture
from asyncdiff.graph.example_inputs import example_inputs
from asyncdiff.graph.signature import parse
from asyncdiff.partition.cost import measure


def _measured_to_graph(
    module: nn.Module, args: Sequence[torch.Tensor], kwargs: Mapping[str, Any]
) -> float:
    """What all nodes are measured to cost, over what the module takes in a CUDA graph."""
    device = torch.device("cuda:0")
    call = parse(module, args, kwargs)
    costs = measure(capture(module, call), call.tensors, device)
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.stream(stream):
            module(*args, **kwargs)  # libraries choose their kernels
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            module(*args, **kwargs)
    times = []
    for _ in range(20):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize(device)
        times.append(begun.elapsed_time(ended))
    return sum(costs.ms.values()) / statistics.median(times)


@pytest.mark.alone
def test_small_nodes_costs_are_the_graphs() -> None:
    """Hundreds of nodes: what is measured around each of them must not count."""
    unet = reference.pipeline(reference.case(reference.NAMES[0]), "cuda:0").unet
    assert 0.6 < _measured_to_graph(unet, (), example_inputs(unet)) < 1.4


@pytest.mark.alone
def test_large_nodes_costs_are_the_graphs() -> None:
    """Values must leave the cache as they do in the graph: freed, and their memory used again."""
    layers: list[nn.Module] = []
    for _ in range(12):
        layers += [nn.GroupNorm(32, 320), nn.SiLU(), nn.Conv2d(320, 320, 1)]
    module = nn.Sequential(*layers).half().to("cuda:0")
    x = torch.randn(16, 320, 64, 64, device="cuda:0", dtype=torch.float16)
    assert 0.85 < _measured_to_graph(module, (x,), {}) < 1.15
