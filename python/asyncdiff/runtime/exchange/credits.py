"""Room for bundles that go to other hosts: the host waits for it, so that no GPU has to. See
:mod:`.awaited`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import asyncdiff_core as core

from ...schedule.actions import NOTHING
from .compression.sent import Runs
from .push import Ways
from .results import Result


class Credits:
    """What a rank has sent to other hosts in a generation, by channel: before a run is issued that
    sends more, the host waits until there is a free slot for it."""

    def __init__(self) -> None:
        self._sent: dict[core.Channel, int] = {}

    def begin(self) -> None:
        """The fabric is reset: nothing was sent yet."""
        self._sent.clear()

    def take(self, channels: Iterable[core.Channel]) -> None:
        """A bundle is to be sent on each of these. Raises what the core does."""
        for channel in channels:
            sent = self._sent[channel] = self._sent.get(channel, 0) + 1
            channel.wait_free(sent)

    def take_for(self, slots: Runs, senders: Mapping[int, Ways], result: Result | None) -> None:
        """A run is to send what its ``slots`` say to these. Raises what the core does."""
        _, write, delivers = slots
        if write != NOTHING:
            self.take(by_slot[write].channel for by_slot in senders.values())
        if delivers and result is not None:
            self.take([result.channel])
