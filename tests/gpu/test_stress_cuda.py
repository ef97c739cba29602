"""A million exchanges: random sizes, modes, delays, graphs and eager calls, every word checked."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import PLACES, devices_for

import asyncdiff_core as core

EXCHANGES = 1_000_000
SIZES = (1, 2, 33, 1000, 5003)  # int64 each
PER_GRAPH = 250


class Pair:
    """Channels of every mode and size from rank 0 to rank 1; every bundle is full of its number."""

    def __init__(self, place: str, seed: int, *, waits: bool = True) -> None:
        self.waits = waits
        self.random = random.Random(seed)
        self.devices = devices_for(place, 2)
        self.fabric = core.CudaFabric(self.devices, deadline=60)
        self.streams = [torch.cuda.Stream(d) for d in self.devices]
        self.channels = [
            self.fabric.channel(
                0, [1], core.Layout([core.TensorSpec("int64", (n,))]), slots=slots, mode=mode
            )
            for mode in ("inline", "kernel", "copy")
            for n in SIZES
            for slots in (1, 2)
        ]
        here, there = (f"cuda:{d}" for d in self.devices)
        count = len(self.channels)
        self.sent = [0] * count  # known on the host, for the slots
        self.received = [0] * count
        self.numbers = torch.zeros(count, dtype=torch.int64, device=here)
        self.expected = torch.zeros(count, dtype=torch.int64, device=there)
        self.wrong = torch.zeros((), dtype=torch.int64, device=there)
        self.room = [torch.zeros(c.layout.specs[0].shape, dtype=torch.int64, device=here)
                     for c in self.channels]  # fmt: skip
        self.mailboxes = [
            [torch.as_tensor(c.slot(1, s), device=there)[: c.layout.specs[0].nbytes]
             .view(torch.int64) for s in range(c.slots)]
            for c in self.channels
        ]  # fmt: skip
        self.load_kernels()

    def load_kernels(self) -> None:
        """Loading a kernel, or allocating for a stream, for the first time may wait for the device.

        Which then waits for what comes after it. Of the same tensors: which kernel an operation
        takes depends on sizes and alignment.
        """
        with torch.cuda.device(self.devices[0]), torch.cuda.stream(self.streams[0]):
            torch.cuda._sleep(1)
            for number, room in zip(self.numbers, self.room, strict=True):
                number.add_(0)
                room.copy_(number)
        with torch.cuda.device(self.devices[1]), torch.cuda.stream(self.streams[1]):
            torch.cuda._sleep(1)
            for i, expected in enumerate(self.expected):
                expected.add_(0)
                for slot in range(self.channels[i].slots):
                    self.check(i, slot)
        for device in self.devices:
            torch.cuda.synchronize(device)
        self.wrong.zero_()
        torch.cuda.synchronize(self.devices[1])

    def order(self) -> list[tuple[int, bool, bool]]:
        """Channels in random order, each an even number of times: replays keep their slots."""
        some = [self.random.randrange(len(self.channels)) for _ in range(PER_GRAPH // 2)]
        both = some + some
        self.random.shuffle(both)
        return [(i, self.random.random() < 0.02, self.random.random() < 0.02) for i in both]

    def send(self, order: list[tuple[int, bool, bool]]) -> None:
        with torch.cuda.device(self.devices[0]), torch.cuda.stream(self.streams[0]):
            for i, delay, _ in order:
                if delay:
                    torch.cuda._sleep(20_000)
                self.numbers[i].add_(1)
                self.room[i].copy_(self.numbers[i])
                channel = self.channels[i]
                channel.put([self.room[i]], self.sent[i] % channel.slots, self.streams[0])
                self.sent[i] += 1

    def receive(self, order: list[tuple[int, bool, bool]]) -> None:
        with torch.cuda.device(self.devices[1]), torch.cuda.stream(self.streams[1]):
            for i, _, delay in order:
                if delay:
                    torch.cuda._sleep(20_000)
                self.expected[i].add_(1)
                channel = self.channels[i]
                slot = self.received[i] % channel.slots
                if not self.waits:
                    self.check(i, slot)
                channel.get(1, slot, self.streams[1])
                if self.waits:
                    self.check(i, slot)
                channel.release(1, slot, self.streams[1])
                self.received[i] += 1

    def check(self, i: int, slot: int) -> None:
        self.wrong.add_((self.mailboxes[i][slot] != self.expected[i]).sum())

    def captured(self, order: list[tuple[int, bool, bool]]) -> list[torch.cuda.CUDAGraph]:
        graphs = []
        before = list(self.sent), list(self.received)
        for rank, work in enumerate((self.send, self.receive)):
            graph = torch.cuda.CUDAGraph()
            with (
                torch.cuda.device(self.devices[rank]),
                torch.cuda.graph(graph, stream=self.streams[rank]),
            ):
                work(order)
            graphs.append(graph)
        self.sent, self.received = before
        return graphs

    def replay(self, graphs: list[torch.cuda.CUDAGraph]) -> None:
        for rank, graph in enumerate(graphs):
            with torch.cuda.device(self.devices[rank]), torch.cuda.stream(self.streams[rank]):
                graph.replay()

    def synchronize(self) -> None:
        for stream in self.streams:
            stream.synchronize()
        self.fabric.check()


def both(pair: Pair, order: list[tuple[int, bool, bool]]) -> None:
    """Eagerly, in parts: a stream takes about a thousand launches, then the caller waits for it."""
    for start in range(0, len(order), 50):
        pair.send(order[start : start + 50])
        pair.receive(order[start : start + 50])


def run(pair: Pair, exchanges: int) -> int:
    orders = [pair.order() for _ in range(8)]
    both(pair, orders[0])  # everything runs once before it is captured
    pair.synchronize()
    graphs = [pair.captured(order) for order in orders]
    done = PER_GRAPH
    while done < exchanges:
        n = pair.random.randrange(8)
        if pair.random.random() < 0.02:
            both(pair, orders[n])
        else:
            pair.replay(graphs[n])
        done += PER_GRAPH
        if done % (PER_GRAPH * 100) == 0:
            pair.synchronize()
    pair.synchronize()
    # What arrived is as many bundles as were sent.
    assert torch.equal(pair.numbers.cpu(), pair.expected.cpu())
    assert pair.numbers.sum().item() == done
    return int(pair.wrong.item())


@pytest.mark.parametrize("place", PLACES)
def test_a_million_exchanges(place: str) -> None:
    assert run(Pair(place, seed=1), EXCHANGES) == 0


@pytest.mark.parametrize("place", PLACES)
def test_a_receiver_that_does_not_wait_is_noticed(place: str) -> None:
    """The control: with the reads before the waits, the same check has to fail."""
    assert run(Pair(place, seed=1, waits=False), 20_000) > 0
