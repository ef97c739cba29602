"""asyncdiff's own channels, in each of their modes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

import asyncdiff_core as core

from ...bundle import memory_of
from ..payload import Memory, Payload
from .link import Link, Make

#: Whether a channel's mode is chosen when it is made. Until then, put takes it.
MODES_OF_CHANNELS = "mode" in inspect.signature(core.Fabric.channel).parameters
UNPACKS = hasattr(core.Channel, "unpack")


class ChannelLink(Link):
    """``put``, ``get`` and ``release`` of one channel."""

    def __init__(
        self,
        world: Any,
        sender: int,
        receivers: Sequence[int],
        payload: Payload,
        slots: int,
        mode: str,
    ) -> None:
        super().__init__(world.devices, world.local, sender, receivers, payload, slots)
        self.channel, self._put = _open(world.fabric, sender, receivers, payload, slots, mode)
        self._slots = {
            r: _slots(self.channel, payload, r, world.devices[r])
            for r in receivers
            if r in world.local
        }

    @property
    def mode(self) -> str | None:
        """What "auto" has become."""
        return getattr(self.channel, "mode", None)

    def holds(self, receiver: int) -> bool:
        return receiver in self._slots

    def received(self, receiver: int, n: int) -> Memory:
        return self._slots[receiver][n % self.slots]

    def send(self, n: int, stream: Any) -> None:
        self._put(self.source(n).tensors, n % self.slots, stream)

    def receive(self, receiver: int, n: int, stream: Any) -> None:
        self.channel.get(receiver, n % self.slots, stream)

    def release(self, receiver: int, n: int, stream: Any) -> None:
        self.channel.release(receiver, n % self.slots, stream)


class UnpackLink(ChannelLink):
    """The receiver copies the bundle out and releases it, in one launch."""

    def __init__(
        self, world: Any, sender: int, receivers: Sequence[int], payload: Payload, slots: int
    ) -> None:
        super().__init__(world, sender, receivers, payload, slots, "auto")
        self._slots = {
            r: [payload.memory(world.devices[r]) for _ in range(slots)] for r in self._slots
        }

    def receive(self, receiver: int, n: int, stream: Any) -> None:
        channel: Any = self.channel
        channel.unpack(receiver, self.received(receiver, n).tensors, n % self.slots, stream)

    def release(self, receiver: int, n: int, stream: Any) -> None:
        pass  # unpack did it


def mode(name: str) -> Make:
    """Makes links of channels in this mode."""

    def make(
        world: Any, sender: int, receivers: Sequence[int], payload: Payload, slots: int
    ) -> Link:
        return ChannelLink(world, sender, receivers, payload, slots, name)

    return make


def _slots(
    channel: core.Channel, payload: Payload, receiver: int, device: torch.device
) -> list[Memory]:
    buffers = (channel.slot(receiver, s) for s in range(channel.slots))
    return [Memory(memory_of(b, device), payload.layout) for b in buffers]


def _open(
    fabric: core.Fabric,
    sender: int,
    receivers: Sequence[int],
    payload: Payload,
    slots: int,
    mode: str,
) -> tuple[core.Channel, Callable[..., None]]:
    """A channel, and its put."""
    about: dict[str, Any] = {"slots": slots, "name": payload.name}
    if MODES_OF_CHANNELS:
        about["mode"] = mode
        channel = fabric.channel(sender, receivers, payload.layout, **about)
        return channel, channel.put
    channel = fabric.channel(sender, receivers, payload.layout, **about)
    old: Any = channel.put
    kind = "kernel" if mode == "kernel" else "copy"
    return channel, lambda tensors, slot, stream: old(tensors, slot, stream, mode=kind)
