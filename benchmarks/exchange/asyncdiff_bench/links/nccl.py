"""NCCL through torch.distributed: send and receive, and broadcast. One process a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from ..payload import Memory, Payload
from .link import Link


class _NcclLink(Link):
    """Who receives owns a buffer for each slot. NCCL sends when the receiver has come to it, so a
    slot is free when the receiver's stream is that far."""

    def __init__(
        self, world: Any, sender: int, receivers: Sequence[int], payload: Payload, slots: int
    ) -> None:
        super().__init__(world.devices, world.local, sender, receivers, payload, slots)
        self._rank = world.local[0]
        self._slots = []
        if self._rank in receivers:
            self._slots = [payload.memory(world.devices[self._rank]) for _ in range(slots)]
        self._group = world.group([sender, *receivers])

    def holds(self, receiver: int) -> bool:
        return receiver == self._rank

    def received(self, receiver: int, n: int) -> Memory:
        return self._slots[n % self.slots]


class SendReceiveLink(_NcclLink):
    """One send and one receive a tensor, all of a bundle in one group."""

    grouped = True

    def send(self, n: int, stream: Any) -> None:
        self._run(self._sends(n))

    def receive(self, receiver: int, n: int, stream: Any) -> None:
        self._run(self._receives(n))

    def send_and_receive(self, other: Link, n: int, stream: Any) -> None:
        assert isinstance(other, SendReceiveLink)
        _together([*self._sends(n), *other._receives(n)])

    def _run(self, operations: list[dist.P2POp]) -> None:
        # One tensor for one receiver goes as most programs send it, for a group costs more. Both
        # ends have to decide alike: torch gives groups another communicator than pairs.
        if len(self.receivers) > 1 or len(self.payload.specs) > 1:
            _together(operations)
            return
        (p,) = operations
        call = dist.send if p.op is dist.isend else dist.recv
        call(p.tensor, p.peer, group=p.group)

    def _sends(self, n: int) -> list[dist.P2POp]:
        source = self.source(n).raw
        group = self._group
        return [dist.P2POp(dist.isend, t, r, group) for r in self.receivers for t in source]

    def _receives(self, n: int) -> list[dist.P2POp]:
        slot = self._slots[n % self.slots].raw
        return [dist.P2POp(dist.irecv, t, self.sender, self._group) for t in slot]


class BroadcastLink(_NcclLink):
    """One broadcast a tensor, as the published AsyncDiff code does it."""

    def send(self, n: int, stream: Any) -> None:
        for tensor in self.source(n).raw:
            dist.broadcast(tensor, self.sender, group=self._group)

    def receive(self, receiver: int, n: int, stream: Any) -> None:
        for tensor in self._slots[n % self.slots].raw:
            dist.broadcast(tensor, self.sender, group=self._group)


def _together(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations):
        work.wait()
