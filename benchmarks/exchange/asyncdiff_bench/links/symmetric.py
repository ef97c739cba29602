"""torch's symmetric memory: copies into a peer's buffer, then its signals. One process a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..payload import Memory, Payload
from .link import Link

_DEADLINE_MS = 10_000  # a signal that does not come by then traps, which ends the process


class SymmetricLink(Link):
    """``put_signal`` and ``wait_signal`` are binary, so each slot has a channel for "arrived" and
    one for "free"; free slots are signalled once when the link is made."""

    def __init__(
        self, world: Any, sender: int, receivers: Sequence[int], payload: Payload, slots: int
    ) -> None:
        import torch.distributed._symmetric_memory as symmetric

        super().__init__(world.devices, world.local, sender, receivers, payload, slots)
        self._rank = world.local[0]
        layout = payload.layout
        size = -(-max(layout.nbytes, 1) // 256) * 256
        device = world.devices[self._rank]
        own = symmetric.empty(size * slots, dtype=torch.uint8, device=device)
        everyone = dist.group.WORLD
        assert everyone is not None
        self._handle = symmetric.rendezvous(own, everyone)
        starts = [size * s for s in range(slots)]
        self._slots = [Memory(own[a : a + size], layout) for a in starts]
        self._targets: dict[int, list[Memory]] = {}
        if self._rank == sender:
            for r in receivers:
                memory = self._handle.get_buffer(r, (size * slots,), torch.uint8)
                self._targets[r] = [Memory(memory[a : a + size], layout) for a in starts]
        elif self._rank in receivers:
            for slot in range(slots):
                self._handle.put_signal(sender, slots + slot, _DEADLINE_MS)
        torch.cuda.synchronize(device)

    def holds(self, receiver: int) -> bool:
        return receiver == self._rank

    def received(self, receiver: int, n: int) -> Memory:
        return self._slots[n % self.slots]

    def send(self, n: int, stream: Any) -> None:
        slot = n % self.slots
        source = self.source(n).raw
        for r in self.receivers:
            self._handle.wait_signal(r, self.slots + slot, _DEADLINE_MS)
            for a, b in zip(source, self._targets[r][slot].raw, strict=True):
                b.copy_(a)
            self._handle.put_signal(r, slot, _DEADLINE_MS)

    def receive(self, receiver: int, n: int, stream: Any) -> None:
        self._handle.wait_signal(self.sender, n % self.slots, _DEADLINE_MS)

    def release(self, receiver: int, n: int, stream: Any) -> None:
        self._handle.put_signal(self.sender, self.slots + n % self.slots, _DEADLINE_MS)
