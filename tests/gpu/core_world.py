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
        device = f"cuda:{self.devices[receiver]}"
        raw = torch.as_tensor(self.channel.slot(receiver, slot), device=device)
        return [
            raw[o : o + s.nbytes].view(getattr(torch, s.dtype)).as_strided(s.shape, s.strides)
            for s, o in zip(self.layout.specs, self.layout.offsets, strict=True)
        ]

    def put(self, slot: int) -> None:
        self.channel.put(self.tensors, slot, self.streams[0])

    def receive(self, receiver: int, slot: int, into: list[torch.Tensor]) -> None:
        """Get, copy out on the receiver's stream, release."""
        stream = self.streams[receiver]
        self.channel.get(receiver, slot, stream)
        with torch.cuda.device(self.devices[receiver]), torch.cuda.stream(stream):
            for new, view in zip(into, self.views(receiver, slot), strict=True):
                new.copy_(view)
        self.channel.release(receiver, slot, stream)

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
