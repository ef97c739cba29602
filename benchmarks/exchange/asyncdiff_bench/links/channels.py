"""asyncdiff's own channels, in each of their modes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

import asyncdiff_core as core
from asyncdiff.runtime.exchange.buffers import memory_of

from ..payload import Memory, Payload
from .link import Link, Make


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
        self.channel = world.fabric(max(sender, *receivers) + 1).channel(
            sender, receivers, payload.layout, slots=slots, name=payload.name, mode=mode
        )
        self._slots = {
            r: _slots(self.channel, payload, r, world.devices[r])
            for r in receivers
            if r in world.local
        }

    @property
    def mode(self) -> str:
        """What "auto" has become."""
        return self.channel.mode

    def holds(self, receiver: int) -> bool:
        return receiver in self._slots

    def received(self, receiver: int, n: int) -> Memory:
        return self._slots[receiver][n % self.slots]

    def send(self, n: int, stream: Any) -> None:
        self.sending(n, stream)()

    def sending(self, n: int, stream: Any) -> Callable[[], None]:
        return partial(self.channel.put, self.source(n).tensors, n % self.slots, stream)

    def receive(self, receiver: int, n: int, stream: Any) -> None:
        self.channel.get(receiver, n % self.slots, stream)

    def release(self, receiver: int, n: int, stream: Any) -> None:
        self.channel.release(receiver, n % self.slots, stream)


class PushLink(ChannelLink):
    """Tensor by tensor, as the engine sends values that are computed one after another."""

    def __init__(
        self, world: Any, sender: int, receivers: Sequence[int], payload: Payload, slots: int
    ) -> None:
        super().__init__(world, sender, receivers, payload, slots, "auto")

    def sending(self, n: int, stream: Any) -> Callable[[], None]:
        slot, tensors = n % self.slots, self.source(n).tensors

        def send() -> None:
            self.channel.begin(slot, stream)
            for i, tensor in enumerate(tensors):
                self.channel.push(i, tensor, slot, stream)
            self.channel.commit(slot, stream)

        return send


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
