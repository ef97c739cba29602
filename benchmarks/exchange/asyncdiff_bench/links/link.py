"""One direction of an exchange, whatever moves the data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ..payload import Memory, Payload

#: Contents that differ from bundle to bundle. No multiple of the slots, so that a slot never gets
#: the same bytes twice in a row, and stale ones are noticed.
CONTENTS = 3


class Link(ABC):
    """From ``sender`` to ``receivers``, with ``slots`` bundles in flight.

    ``n`` counts the bundles of one program, from zero; a program moves a multiple of ``slots``.
    Bundle n uses slot ``n % slots``. The operations enqueue on ``stream``, which is the current
    one; on the host they block.
    """

    #: Whether both directions have to be issued together, by :meth:`send_and_receive`.
    grouped = False

    def __init__(
        self,
        devices: Sequence[torch.device],
        local: Sequence[int],
        sender: int,
        receivers: Sequence[int],
        payload: Payload,
        slots: int,
    ) -> None:
        self.sender = sender
        self.receivers = tuple(receivers)
        self.payload = payload
        self.slots = slots
        self._echoed: Link | None = None
        self._sources: list[Memory] = []
        if sender in local:
            self._sources = [payload.memory(devices[sender]) for _ in range(CONTENTS)]
        mine = [r for r in receivers if r in local]
        self._expected = {r: payload.memory(devices[r]) for r in mine[:1]}

    def echo(self, link: Link) -> None:
        """Send what ``link`` brings, in place of contents of its own."""
        self._echoed = link
        self._sources = []

    def source(self, n: int) -> Memory:
        """What bundle n is sent from."""
        if self._echoed is not None:
            return self._echoed.received(self.sender, n)
        return self._sources[n % CONTENTS]

    def refill(self, seed: int) -> None:
        """New contents, which ``seed`` decides. Nothing may be in flight."""
        for i, memory in enumerate(self._sources):
            memory.fill(_seed(seed, i))

    def arrived_whole(self, seed: int, count: int) -> bool:
        """Whether the last bundles of a program of ``count`` lie in the local receivers' slots.

        Nothing may be in flight.
        """
        for expected in self._expected.values():
            for n in range(max(0, count - self.slots), count):
                expected.fill(_seed(seed, n % CONTENTS))
                for rank in self.receivers:
                    got = self.received(rank, n) if self.holds(rank) else None
                    if got is not None and not _same(got, expected):
                        return False
        return True

    @abstractmethod
    def holds(self, receiver: int) -> bool:
        """Whether this process has the receiver's slots."""

    @abstractmethod
    def received(self, receiver: int, n: int) -> Memory:
        """Where bundle n lies at a receiver of this process."""

    @abstractmethod
    def send(self, n: int, stream: Any) -> None:
        """Move bundle n to all receivers, and tell them."""

    def sending(self, n: int, stream: Any) -> Callable[[], None]:
        """A call of :meth:`send`, made ready: what its CPU time is measured by."""
        return partial(self.send, n, stream)

    @abstractmethod
    def receive(self, receiver: int, n: int, stream: Any) -> None:
        """Wait for bundle n: what is enqueued next sees it."""

    def release(self, receiver: int, n: int, stream: Any) -> None:  # noqa: B027
        """Let the slot of bundle n be overwritten. Nothing, where the order of calls does it."""

    def send_and_receive(self, other: Link, n: int, stream: Any) -> None:
        """Send bundle n and receive the other direction's. Only if ``grouped``."""
        raise NotImplementedError


#: Makes a link: world, sender, receivers, payload, slots.
Make = Callable[[Any, int, Sequence[int], Payload, int], Link]


def _seed(seed: int, index: int) -> int:
    return seed * CONTENTS + index


def _same(got: Memory, expected: Memory) -> bool:
    device = expected.raw[0].device
    if got.raw[0].device == device:
        return got.equals(expected)
    # Receivers on several devices are compared on the first one's.
    pairs = zip(got.raw, expected.raw, strict=True)
    return all(torch.equal(a.to(device), b) for a, b in pairs)
