"""What tests of channels between GPUs begin with."""

from __future__ import annotations

import torch
from conftest import PLACES, devices_for

import asyncdiff_core as core

WAYS = [(place, transport) for place in PLACES for transport in ("auto", "staged")]
MODES = ("copy", "kernel", "inline")


class World:
    """A fabric, one channel from rank 0, a stream for each rank."""

    def __init__(
        self,
        place: str,
        transport: str,
        tensors: list[torch.Tensor],
        receivers: int = 1,
        slots: int = 2,
        deadline: float = 10.0,
        mode: str = "copy",
    ) -> None:
        self.devices = devices_for(place, receivers + 1)
        self.fabric = core.CudaFabric(self.devices, deadline=deadline, transport=transport)
        self.slots = slots
        self.receivers = list(range(1, receivers + 1))
        specs = [
            core.TensorSpec(str(t.dtype).removeprefix("torch."), t.shape, t.stride())
            for t in tensors
        ]
        self.layout = core.Layout(specs)
        self.channel = self.fabric.channel(
            0, self.receivers, self.layout, slots=slots, name="bundle", mode=mode
        )
        self.streams = [torch.cuda.Stream(d) for d in self.devices]
        self.tensors = [t.to(f"cuda:{self.devices[0]}") for t in tensors]
        torch.cuda.synchronize(self.devices[0])

    def views(self, receiver: int, slot: int) -> list[torch.Tensor]:
        return views(self.channel, receiver, slot, self.devices[receiver])

    def put(self, slot: int) -> None:
        self.channel.put(self.tensors, slot, self.streams[0])

    def push(self, slot: int) -> None:
        """Tensor by tensor, the last one first."""
        self.channel.begin(slot, self.streams[0])
        for i in reversed(range(len(self.tensors))):
            self.channel.push(i, self.tensors[i], slot, self.streams[0])
        self.channel.commit(slot, self.streams[0])

    def receive(self, receiver: int, slot: int, into: list[torch.Tensor]) -> None:
        """Get, copy out on the receiver's stream, release."""
        receive(self.channel, receiver, slot, self.streams[receiver], into)

    def room(self, receiver: int) -> list[torch.Tensor]:
        return [torch.zeros_like(v) for v in self.views(receiver, 0)]

    def synchronize(self) -> None:
        for stream in self.streams:
            stream.synchronize()

    def check_delivery(self) -> None:
        """The first bundle after a beginning or a reset arrives."""
        room = self.room(1)
        self.tensors[0].fill_(3)
        torch.cuda.synchronize()
        self.put(0)
        self.receive(1, 0, room)
        self.synchronize()
        self.fabric.check()
        assert (room[0] == 3).all()


def views(channel: core.Channel, receiver: int, slot: int, device: int) -> list[torch.Tensor]:
    """The tensors in a slot, where they lie."""
    raw = torch.as_tensor(channel.slot(receiver, slot), device=f"cuda:{device}")
    return [
        raw[o : o + s.nbytes].view(getattr(torch, s.dtype)).as_strided(s.shape, s.strides)
        for s, o in zip(channel.layout.specs, channel.layout.offsets, strict=True)
    ]


def receive(
    channel: core.Channel,
    receiver: int,
    slot: int,
    stream: torch.cuda.Stream,
    into: list[torch.Tensor],
) -> None:
    """Get, copy out on the receiver's stream, release."""
    channel.get(receiver, slot, stream)
    device = stream.device.index
    with torch.cuda.device(device), torch.cuda.stream(stream):
        for new, view in zip(into, views(channel, receiver, slot, device), strict=True):
            new.copy_(view)
    channel.release(receiver, slot, stream)


def mixed_bundle() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(2, 64, 9, 7).to(torch.float16),
        torch.randn(2, 8, 16, 16).to(torch.bfloat16).to(memory_format=torch.channels_last),
        torch.randn(()),
        torch.empty(0, 3),
        torch.arange(33).to(torch.int8),
        torch.randn(1 << 20),
    ]
