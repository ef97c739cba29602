"""Channels as operators of torch on GPUs: in compiled code, and captured in CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import PLACES, devices_for

import asyncdiff_core as core
from asyncdiff import ops

SHAPE = (3, 5)
SLOTS = 2


@pytest.fixture(params=PLACES)
def world(request: pytest.FixtureRequest) -> Iterator[tuple[core.CudaFabric, list[int]]]:
    """There and back between two ranks."""
    devices = devices_for(request.param, 2)
    fabric = core.CudaFabric(devices, deadline=5)
    layout = core.Layout([core.TensorSpec("float32", SHAPE), core.TensorSpec("int64", (4,))])
    ops.register("there", fabric.channel(0, [1], layout, slots=SLOTS))
    ops.register("back", fabric.channel(1, [0], layout, slots=SLOTS))
    yield fabric, devices
    ops.unregister("there")
    ops.unregister("back")
    fabric.close()


def first(x: torch.Tensor, n: torch.Tensor, slot: int) -> None:
    ops.put("there", [(x * 2).t().contiguous().t(), n + 1], slot)  # the strides of another layout


def second(slot: int) -> None:
    x, n = ops.get("there", 1, slot)
    ops.release("there", 1, slot)
    ops.put("back", [x + 1, n * 3], slot)


def last(slot: int) -> list[torch.Tensor]:
    out = ops.get("back", 0, slot)
    ops.release("back", 0, slot)
    return [x * 1 for x in out]


def synchronize(devices: list[int]) -> None:
    for device in set(devices):
        torch.cuda.synchronize(device)


@pytest.mark.parametrize("compiled", [False, True])
def test_there_and_back(world: tuple[core.CudaFabric, list[int]], compiled: bool) -> None:
    fabric, devices = world
    torch._dynamo.reset()
    steps = [torch.compile(f, fullgraph=True) if compiled else f for f in (first, second, last)]
    streams = [torch.cuda.Stream(d) for d in devices]
    kept = []
    for bundle in range(6):
        with torch.cuda.stream(streams[0]):
            x = torch.full(SHAPE, float(bundle), device=f"cuda:{devices[0]}")
            n = torch.arange(4, device=f"cuda:{devices[0]}") + bundle
            steps[0](x, n, bundle % SLOTS)
        with torch.cuda.stream(streams[1]):
            steps[1](bundle % SLOTS)
        with torch.cuda.stream(streams[0]):
            kept.append(steps[2](bundle % SLOTS))
    synchronize(devices)
    fabric.check()
    for bundle, (x, n) in enumerate(kept):
        assert torch.equal(x.cpu(), torch.full(SHAPE, 2.0 * bundle + 1))
        assert torch.equal(n.cpu(), (torch.arange(4) + bundle + 1) * 3)


@pytest.mark.parametrize("compiled", [False, True])
def test_captured_in_graphs(world: tuple[core.CudaFabric, list[int]], compiled: bool) -> None:
    """Each rank's part of a tick in a graph of its own: as many slots as are used in turn."""
    fabric, devices = world
    torch._dynamo.reset()
    wrap = (lambda f: torch.compile(f, fullgraph=True)) if compiled else (lambda f: f)
    there, turn, back = wrap(first), wrap(second), wrap(last)
    x = torch.zeros(SHAPE, device=f"cuda:{devices[0]}")
    n = torch.zeros(4, dtype=torch.int64, device=f"cuda:{devices[0]}")
    streams = [torch.cuda.Stream(d) for d in devices]

    def tick(slot: int) -> list[torch.Tensor]:
        with torch.cuda.stream(streams[0]):
            there(x, n, slot)
        with torch.cuda.stream(streams[1]):
            turn(slot)
        with torch.cuda.stream(streams[0]):
            return back(slot)

    for slot in range(SLOTS):  # compiles
        tick(slot)
    synchronize(devices)
    graphs: list[tuple[torch.cuda.CUDAGraph, ...]] = []
    out: list[list[torch.Tensor]] = []
    for slot in range(SLOTS):
        put, reply, get = (torch.cuda.CUDAGraph() for _ in range(3))
        with torch.cuda.device(devices[0]), torch.cuda.graph(put, stream=streams[0]):
            there(x, n, slot)
        with torch.cuda.device(devices[1]), torch.cuda.graph(reply, stream=streams[1]):
            turn(slot)
        with torch.cuda.device(devices[0]), torch.cuda.graph(get, stream=streams[0]):
            out.append(back(slot))
        graphs.append((put, reply, get))
    for bundle in range(7):
        with torch.cuda.stream(streams[0]):
            x.fill_(bundle)
            n.fill_(bundle)
            graphs[bundle % SLOTS][0].replay()
        with torch.cuda.device(devices[1]), torch.cuda.stream(streams[1]):
            graphs[bundle % SLOTS][1].replay()
        with torch.cuda.stream(streams[0]):
            graphs[bundle % SLOTS][2].replay()
        synchronize(devices)
        found = out[bundle % SLOTS]
        assert torch.equal(found[0].cpu(), torch.full(SHAPE, 2.0 * bundle + 1))
        assert torch.equal(found[1].cpu(), torch.full((4,), 3 * (bundle + 1)))
    fabric.check()


@pytest.mark.parametrize("place", PLACES)
def test_a_wait_without_an_end_is_an_error_at_the_deadline(place: str) -> None:
    devices = devices_for(place, 2)
    fabric = core.CudaFabric(devices, deadline=0.5)
    try:
        layout = core.Layout([core.TensorSpec("float32", SHAPE)])
        ops.register("silent", fabric.channel(0, [1], layout))
        with torch.cuda.device(devices[1]):
            torch.compile(lambda: ops.get("silent", 1, 0), fullgraph=True)()
        synchronize(devices)
        with pytest.raises(core.ExchangeTimeout, match="channel '0 to 1', get of slot 0"):
            fabric.check()
    finally:
        ops.unregister("silent")
        fabric.close()
