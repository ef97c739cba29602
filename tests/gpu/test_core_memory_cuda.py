"""What channels and fabrics have on GPUs, and what becomes of it when they are gone."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import PLACES
from core_world import MODES, WAYS, World, receive

import asyncdiff_core as core


@pytest.mark.parametrize("place", PLACES)
def test_the_current_device_stays(place: str) -> None:
    world = World(place, "auto", [torch.zeros(8)])
    torch.cuda.set_device(0)
    world.put(0)
    world.receive(1, 0, world.room(1))
    assert torch.cuda.current_device() == 0
    assert torch.zeros(1, device="cuda").device.index == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", PLACES)
def test_what_is_dropped_in_the_middle_harms_nobody(place: str, mode: str) -> None:
    """A device may be about to write to another one's memory when its owner is gone."""
    for _ in range(3):
        world = World(place, "auto", [torch.zeros(1 << 20)], mode=mode)
        for n in range(2):
            world.put(n)
            world.receive(1, n, world.room(1))
        world.channel = world.fabric.channel(0, [1], world.layout, mode=mode)
        world.put(0)
        world.receive(1, 0, world.room(1))
        del world  # neither closed nor waited for
    world = World(place, "auto", [torch.full((1 << 20,), 5.0)], mode=mode)
    room = world.room(1)
    world.put(0)
    world.receive(1, 0, room)
    world.synchronize()
    world.fabric.check()
    assert (room[0] == 5).all()
    world.fabric.close()


@pytest.mark.parametrize(("place", "transport"), WAYS)
def test_channels_come_and_go_without_end(place: str, transport: str) -> None:
    """Each takes more than 16 of the fabric's 16384 lines, which the next ones are given."""
    world = World(place, transport, [torch.zeros(50_000)], mode="kernel")
    (tensor,) = world.tensors
    room = world.room(1)
    first = world.channel

    def check(channel: core.Channel, slot: int, value: float) -> None:
        tensor.fill_(value)
        torch.cuda.synchronize(world.devices[0])
        channel.put(world.tensors, slot, world.streams[0])
        receive(channel, 1, slot, world.streams[1], room)
        world.synchronize()
        world.fabric.check()
        assert (room[0] == value).all()

    uses = 0
    for n in range(1500):
        # One that was used, with counts and flags that are not to be found in the next one's lines.
        world.channel = world.fabric.channel(0, [1], world.layout, mode=("kernel", "copy")[n % 2])
        if n % 100 > 1:
            continue
        for slot in (0, 1, 0):
            check(world.channel, slot, n + slot + 0.5)
        check(first, uses % 2, n + 0.25)
        uses += 1
    world.fabric.close()


def test_the_failure_of_a_dropped_channel_is_told() -> None:
    world = World("one GPU", "auto", [torch.zeros(8)], deadline=0.3)
    world.channel.get(1, 0, world.streams[1])
    world.synchronize()
    for _ in range(2):
        world.channel = world.fabric.channel(0, [1], world.layout, name="another")
    with pytest.raises(core.ExchangeTimeout, match="channel 'bundle', get of slot 0"):
        world.fabric.check()
    world.fabric.reset(1)
    # At zero, though the lines of those that are gone were set to one.
    world.channel = world.fabric.channel(0, [1], world.layout)
    world.check_delivery()


def test_dropping_breaks_no_capture() -> None:
    """Neither in the thread that captures, where garbage is collected too, nor in another one."""
    worlds = [World("one GPU", "auto", [torch.zeros(8)]) for _ in range(2)]
    value = torch.zeros(1, device="cuda")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        value.add_(1)
        other = threading.Thread(target=worlds.pop)
        other.start()
        other.join()
        worlds.clear()
        value.add_(1)
    graph.replay()
    torch.cuda.synchronize()
    assert value.item() == 2
    World("one GPU", "auto", [torch.zeros(8)]).fabric.close()  # frees what was dropped


def test_mailboxes_outlive_their_fabric() -> None:
    world = World("one GPU", "auto", [torch.ones(8)])
    world.put(0)
    world.synchronize()
    (view,) = world.views(1, 0)
    world.fabric.close()
    world.fabric.close()
    with pytest.raises(core.CoreError, match="closed"):
        world.put(1)
    del world
    assert view.sum().item() == 8
