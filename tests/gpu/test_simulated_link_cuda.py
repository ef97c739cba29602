"""Simulated links between GPUs: bundles take what the model says, eagerly and in graphs, and the
sender's other streams wait for nothing."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence

import pytest
import torch
from conftest import PLACES, devices_for
from core_world import MODES, WAYS, mixed_bundle
from core_world import World as Exchange

import asyncdiff_core as core

#: GB/s and microseconds; slower than any link between GPUs, so that the model is what is measured.
GB_PER_S, LATENCY_US = 2.0, 50.0
#: Microseconds that kernels and copies may add.
LATE = 60.0
#: Those of a small copy to another GPU, which begins when the one before has ended (two H200s).
COPY = 13.0
#: Those that the host takes to enqueue one.
ENQUEUED = 4.0
#: Microseconds that clocks may err by.
EARLY = 3.0
SIZES = [1 << 12, 1 << 20, 1 << 24]


class World:
    """Ranks on GPUs, and a stream for each."""

    def __init__(self, place: str, ranks: int = 2, sharing: str = "", deadline: float = 10) -> None:
        self.devices = devices_for(place, ranks)
        link = f"{GB_PER_S}GB/s,{LATENCY_US}us{sharing}"
        self.fabric = core.CudaFabric(self.devices, link=link, deadline=deadline)
        self.streams = [torch.cuda.Stream(d) for d in self.devices]
        assert self.fabric.simulated_link is not None
        assert self.fabric.links()[0, 1] == "simulated"

    def channel(
        self, sender: int, receivers: Sequence[int], nbytes: int, mode: str, pieces: int = 1
    ):
        specs = [core.TensorSpec("uint8", (nbytes // pieces,))] * pieces
        return self.fabric.channel(sender, receivers, core.Layout(specs), slots=2, mode=mode)

    def data(self, rank: int, nbytes: int, pieces: int = 1) -> list[torch.Tensor]:
        device = f"cuda:{self.devices[rank]}"
        return [torch.ones(nbytes // pieces, dtype=torch.uint8, device=device)] * pieces

    def synchronize(self) -> None:
        for device in set(self.devices):
            torch.cuda.synchronize(device)


def model_us(nbytes: int, times: int = 1) -> float:
    return LATENCY_US + times * nbytes / GB_PER_S / 1e3


def graph_of(stream: torch.cuda.Stream, work: Callable[[], None]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(stream.device), torch.cuda.graph(graph, stream=stream):
        work()

    def replay() -> None:
        with torch.cuda.device(stream.device), torch.cuda.stream(stream):
            graph.replay()

    return replay


@pytest.mark.alone
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize(
    ("mode", "pieces"), [("copy", 1), ("copy", 8), ("kernel", 4), ("inline", 1)]
)
def test_there_and_back_takes_twice_the_model(
    place: str, graphs: bool, nbytes: int, mode: str, pieces: int
) -> None:
    world = World(place)
    there, back = (world.channel(r, [1 - r], nbytes, mode, pieces) for r in range(2))
    assert there.mode == ("kernel" if mode == "inline" else mode)
    data = [world.data(r, nbytes, pieces) for r in range(2)]
    world.synchronize()
    a, b = world.streams
    rounds = 6

    def ask(slot: int) -> None:
        there.put(data[0], slot, a)
        back.get(0, slot, a)
        back.release(0, slot, a)

    def answer(slot: int) -> None:
        there.get(1, slot, b)
        there.release(1, slot, b)
        back.put(data[1], slot, b)

    works = [[lambda s=s: ask(s) for s in range(2)], [lambda s=s: answer(s) for s in range(2)]]
    if graphs:
        works = [[graph_of(s, w) for w in both] for s, both in zip((a, b), works, strict=True)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    for n in range(rounds):
        marks[n].record(a)
        works[0][n % 2]()
        works[1][n % 2]()
    marks[rounds].record(a)
    world.synchronize()
    world.fabric.check()
    us = [1e3 * x.elapsed_time(y) for x, y in itertools.pairwise(marks)][1:]
    for took in us:
        assert took >= 2 * (model_us(nbytes) - EARLY)
    late = LATE
    if mode == "copy":
        # Copies that take longer than the link does are what is waited for.
        each = COPY if len(set(world.devices)) > 1 else 0.0 if graphs else ENQUEUED
        late += max(each * (pieces - 1) - (model_us(nbytes) - LATENCY_US), 0.0)
    assert statistics.median(us) <= 2 * (model_us(nbytes) + late)


@pytest.mark.parametrize(("place", "transport"), WAYS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sharing", ["", ",all"])
def test_any_tensors_arrive_whole(
    place: str, transport: str, mode: str, sharing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASYNCDIFF_LINK", f"3GB/s,30us{sharing}")
    world = Exchange(place, transport, mixed_bundle(), receivers=3, mode=mode)
    rooms = {r: world.room(r) for r in world.receivers}
    for n in range(6):
        for tensor in world.tensors:
            tensor.copy_(tensor + 1)
        torch.cuda.synchronize(world.devices[0])
        (world.put if n % 3 else world.push)(n % 2)
        for r in world.receivers:
            world.receive(r, n % 2, rooms[r])
        world.synchronize()
        world.fabric.check()
        for room in rooms.values():
            for sent, got in zip(world.tensors, room, strict=True):
                assert torch.equal(sent.cpu(), got.cpu())


@pytest.mark.alone
@pytest.mark.parametrize("place", PLACES)
def test_pieces_leave_while_the_sender_computes(place: str) -> None:
    """Pushed beside a computation that takes longer than all of them: the latency is left."""
    world = World(place)
    nbytes, pieces = 1 << 22, 4
    channel = world.channel(0, [1], nbytes, "copy", pieces)
    data = world.data(0, nbytes, pieces)
    compute = torch.cuda.Stream(world.devices[0])
    world.synchronize()
    send, receive = world.streams
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    for n in range(3):
        with torch.cuda.device(world.devices[0]), torch.cuda.stream(compute):
            marks[0].record()
            send.wait_stream(compute)
            channel.begin(n % 2, send)
            for i, piece in enumerate(data):
                send.wait_stream(compute)
                channel.push(i, piece, n % 2, send)
                torch.cuda._sleep(4_000_000)  # 2 ms at 2 GHz: as long as all pieces take
            marks[1].record()
            send.wait_stream(compute)
            channel.commit(n % 2, send)
            marks[2].record(send)
        channel.get(1, n % 2, receive)
        channel.release(1, n % 2, receive)
        world.synchronize()
        world.fabric.check()
        # The commit itself takes the latency; the computation waited for nothing.
        assert 1e3 * marks[1].elapsed_time(marks[2]) <= LATENCY_US + LATE
        assert 1e3 * marks[1].elapsed_time(marks[2]) >= LATENCY_US - EARLY


@pytest.mark.alone
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("sharing", "times"), [("", 1), (",both", 2), (",all", 2)])
def test_both_directions_at_once(place: str, sharing: str, times: int) -> None:
    world = World(place, sharing=sharing)
    nbytes = 1 << 23
    channels = [world.channel(r, [1 - r], nbytes, "copy") for r in range(2)]
    data = [world.data(r, nbytes) for r in range(2)]
    world.synchronize()
    us = []
    for n in range(5):
        marks = []
        for r, stream in enumerate(world.streams):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record(stream)
            channels[r].put(data[r], n % 2, stream)
            last.record(stream)
            marks.append((first, last))
        for r, stream in enumerate(world.streams):
            channels[1 - r].get(r, n % 2, stream)
            channels[1 - r].release(r, n % 2, stream)
        world.synchronize()
        world.fabric.check()
        us.append([1e3 * first.elapsed_time(last) for first, last in marks])
    model = model_us(nbytes, times)
    assert all(took >= model_us(nbytes) - EARLY for both in us for took in both)
    # They do not begin at the same moment, so that one has the link for itself at first.
    assert 0.9 * model <= statistics.median(max(both) for both in us) <= 1.05 * model + LATE


@pytest.mark.alone
def test_a_small_bundle_does_not_wait_for_a_large_one() -> None:
    """Put together: a noise prediction for one rank, and hidden states for another."""
    world = World("one GPU", ranks=3)
    large, small = world.channel(0, [1], 1 << 23, "copy"), world.channel(0, [2], 1 << 12, "kernel")
    data = world.data(0, 1 << 23), world.data(0, 1 << 12)
    world.synchronize()
    begun, there = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record(world.streams[0])
    world.streams[2].wait_event(begun)
    world.fabric.put_batch([(large, data[0], 0), (small, data[1], 0)], world.streams[0])
    small.get(2, 0, world.streams[2])
    there.record(world.streams[2])
    large.get(1, 0, world.streams[1])
    world.synchronize()
    world.fabric.check()
    assert (
        model_us(1 << 12) - EARLY <= 1e3 * begun.elapsed_time(there) <= model_us(1 << 12) + 3 * LATE
    )


def test_waits_keep_the_deadline() -> None:
    world = World("one GPU", deadline=0.3)
    nbytes = 1 << 30  # half a second
    channel = world.channel(0, [1], nbytes, "copy")
    data = world.data(0, nbytes)
    world.synchronize()
    channel.put(data, 0, world.streams[0])
    world.synchronize()
    with pytest.raises(core.ExchangeTimeout):
        world.fabric.check()
    world.fabric.reset()
