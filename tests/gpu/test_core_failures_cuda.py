"""Channels between GPUs where something fails, or is done wrong."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from core_world import WAYS, World

import asyncdiff_core as core


@pytest.mark.parametrize("mode", ["kernel", "inline"])
def test_a_fused_put_waits_and_gives_up_like_the_other(mode: str) -> None:
    world = World("one GPU", "auto", [torch.zeros(1 << 20)], deadline=0.3, mode=mode)
    for n in range(3):
        world.put(n % 2)
    world.synchronize()
    with pytest.raises(core.ExchangeTimeout, match="begin of slot 0") as caught:
        world.fabric.check()
    assert (caught.value.rank, caught.value.peer) == (0, 1)
    world.fabric.reset()
    world.put(1)
    world.synchronize()
    with pytest.raises(core.SlotOrderError, match="slot 0 is next"):
        world.fabric.check()
    world.fabric.reset()
    world.check_delivery()


@pytest.mark.parametrize(("place", "transport"), WAYS)
@pytest.mark.parametrize("mode", ["kernel", "inline"])
def test_a_missing_bundle_is_a_timeout_with_names(place: str, transport: str, mode: str) -> None:
    world = World(place, transport, [torch.zeros(8)], deadline=0.3, mode=mode)
    begun = time.monotonic()
    world.channel.get(1, 0, world.streams[1])
    world.synchronize()
    assert 0.25 < time.monotonic() - begun < 5
    with pytest.raises(core.ExchangeTimeout, match="rank 1, channel 'bundle', get of slot 0") as e:
        world.fabric.check()
    error = e.value
    assert (error.rank, error.peer, error.slot, error.operation) == (1, 0, 0, "get")
    assert (error.expected, error.seen) == (1, 0)
    # Everything after it returns at once, and a reset makes it all good again.
    begun = time.monotonic()
    for n in range(1, 20):
        world.channel.get(1, n % 2, world.streams[1])
    world.synchronize()
    assert time.monotonic() - begun < 0.25
    world.fabric.reset()
    world.fabric.check()
    room = world.room(1)
    world.put(0)
    world.receive(1, 0, room)
    world.synchronize()
    world.fabric.check()


def test_a_slow_receiver_is_a_timeout_of_the_sender() -> None:
    world = World("one GPU", "auto", [torch.zeros(8)], deadline=0.3)
    for n in range(3):
        world.put(n % 2)
    world.synchronize()
    with pytest.raises(core.ExchangeTimeout, match="begin of slot 0") as caught:
        world.fabric.check()
    assert (caught.value.rank, caught.value.peer) == (0, 1)
    assert (caught.value.expected, caught.value.seen) == (1, 0)


def test_an_abort_ends_waits() -> None:
    world = World("one GPU", "auto", [torch.zeros(8)], deadline=60)
    world.channel.get(1, 0, world.streams[1])
    threading.Timer(0.2, world.fabric.abort, (0, "enough")).start()
    begun = time.monotonic()
    world.synchronize()
    assert time.monotonic() - begun < 10
    with pytest.raises(core.Aborted, match="rank 0 aborted the exchange: enough"):
        world.fabric.check()
    world.fabric.reset()
    world.fabric.abort(0, "x" + "é" * 300)  # what there is room for ends inside a character
    with pytest.raises(core.Aborted, match=r"exchange: xé{250,251}$"):
        world.fabric.check()


@pytest.mark.parametrize("case", ["begin", "commit", "get", "release"])
@pytest.mark.parametrize("mode", ["kernel", "inline"])
def test_slots_out_of_turn(case: str, mode: str) -> None:
    world = World("one GPU", "auto", [torch.zeros(8)], deadline=5, mode=mode)
    stream = world.streams[0]
    if case == "begin":
        world.channel.begin(1, stream)
    elif case == "commit":
        world.channel.commit(0, stream)
    elif case == "get":
        world.channel.get(1, 1, stream)
    else:
        world.channel.release(1, 0, stream)
    world.synchronize()
    with pytest.raises(core.SlotOrderError, match="n-th bundle uses slot") as caught:
        world.fabric.check()
    assert caught.value.operation == case


def test_mistakes_on_the_host_are_refused() -> None:
    world = World("one GPU", "auto", [torch.zeros(8)])
    with pytest.raises(core.InvalidArgument, match="lies on the CPU"):
        world.channel.put([torch.zeros(8)], 0, world.streams[0])
    with pytest.raises(core.InvalidArgument, match="float64"):
        world.channel.put([torch.zeros(8, device="cuda").double()], 0, world.streams[0])
    count = torch.cuda.device_count()
    with pytest.raises(core.DeviceError, match=f"CUDA device {count} does not exist"):
        core.CudaFabric([0, count])
    with pytest.raises(core.InvalidArgument, match="choose auto, peer or staged"):
        core.CudaFabric([0], transport="carrier pigeon")
    huge = core.Layout([core.TensorSpec("uint8", (1 << 42,))])
    with pytest.raises(core.CudaError, match="allocating"):
        world.fabric.channel(0, [1], huge)
    assert world.fabric.channel(0, [1], world.layout).slots == 2
