"""Room for bundles that go to other hosts: the host waits for it, so that no GPU has to. See
:mod:`.awaited`."""

from __future__ import annotations

from collections.abc import Mapping

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

    def take(self, channel: core.Channel) -> int:
        """The slot of the next bundle on this channel, free. Raises what the core does."""
        sent = self._sent.get(channel, 0)
        self._sent[channel] = sent + 1
        channel.wait_free(sent + 1)
        return sent % channel.slots

    def take_for(self, slots: Runs, senders: Mapping[int, Ways], result: Result | None) -> int:
        """The slot of the noise prediction, if a run is to send one besides what else its ``slots``
        say, all of them free. Raises what the core does."""
        _, write, delivers = slots
        if write != NOTHING:
            for by_slot in senders.values():
                self.take(by_slot[write].channel)
        return self.take(result.channel) if delivers and result is not None else 0
