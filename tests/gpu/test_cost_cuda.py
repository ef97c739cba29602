"""What nodes are measured to cost on a GPU."""

from __future__ import annotations

import statistics

import reference
import torch

from asyncdiff.calls import parse
from asyncdiff.capture import capture
from asyncdiff.cost import measure
from asyncdiff.example_inputs import example_inputs


def test_the_nodes_costs_are_the_graphs() -> None:
    """Small nodes, hundreds of them: what is measured around each of them must not count."""
    device = torch.device("cuda:0")
    unet = reference.pipeline(reference.case(reference.NAMES[0]), "cuda:0").unet
    inputs = example_inputs(unet)
    call = parse(unet, (), inputs)
    costs = measure(capture(unet, call), call.tensors, device)
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.stream(stream):
            unet(**inputs)  # libraries choose their kernels
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            unet(**inputs)
    times = []
    for _ in range(20):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize(device)
        times.append(begun.elapsed_time(ended))
    whole = statistics.median(times)
    assert 0.6 * whole < sum(costs.ms.values()) < 1.4 * whole
