"""Bundles from GPUs of other hosts: the host waits for each, and for room for those that it sends
(:mod:`.credits`), so that no GPU waits for another host.

NCCL's part of a bundle's way is enqueued by a thread of this process once the bundle is sent. While
a GPU waits for one, whatever else the process asks of the driver may keep that thread from it: to
load a kernel, as the first call of each does, or to free memory, the driver waits for the GPU, and
lets nobody enqueue anything meanwhile. Then each would wait for the other, until the deadline.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Protocol

import torch

import asyncdiff_core as core

#: Seconds between two looks at what a GPU has done.
_LOOK = 5e-5


class Bundles(Protocol):
    """A rank's end of a way by which it is given bundles."""

    @property
    def slots(self) -> int:
        """How many bundles there is room for."""

    def get(self, receiver: int, slot: int, stream: torch.cuda.Stream | None = None) -> None:
        """Wait until the next bundle lies in ``slot``."""

    def release(self, receiver: int, slot: int, stream: torch.cuda.Stream | None = None) -> None:
        """Give the slot back."""

    def slot(self, receiver: int, slot: int) -> core.Buffer:
        """Where the bundles of a slot lie."""


class Awaited:
    """One receiver's end of a ``channel``, whose gets are never captured in graphs: each waits on
    the host until its bundle is there."""

    def __init__(self, channel: core.Channel) -> None:
        self._channel = channel
        self._taken = 0

    @property
    def slots(self) -> int:
        """How many bundles there is room for."""
        return self._channel.slots

    def begin(self) -> None:
        """The fabric is reset: nothing was sent yet."""
        self._taken = 0

    def get(self, receiver: int, slot: int, stream: torch.cuda.Stream | None = None) -> None:
        """Wait for the next bundle. Raises what the core does."""
        self._taken += 1
        self._channel.wait_for(receiver, self._taken)
        self._channel.get(receiver, slot, stream)

    def release(self, receiver: int, slot: int, stream: torch.cuda.Stream | None = None) -> None:
        """Give the slot back."""
        self._channel.release(receiver, slot, stream)

    def slot(self, receiver: int, slot: int) -> core.Buffer:
        """Where the bundles of a slot lie."""
        return self._channel.slot(receiver, slot)


def until_done(streams: Iterable[torch.cuda.Stream]) -> None:
    """Wait on the host until GPUs have done what was enqueued on streams, asking the driver for
    nothing that others would have to wait for."""
    for done in [stream.record_event() for stream in streams]:
        while not done.query():
            time.sleep(_LOOK)
