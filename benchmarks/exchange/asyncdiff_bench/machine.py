"""What the benchmark runs on: one device a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import BenchError

#: Fewer cannot show one sender with several receivers.
RANKS = 3


@dataclass(frozen=True)
class Machine:
    """One device a rank; at least three ranks, of which pairs use the first two."""

    devices: tuple[str, ...]

    @classmethod
    def of(cls, devices: Sequence[str]) -> Machine:
        """Ranks on ``devices`` in turn; the last one is used again where there are too few."""
        if not devices:
            raise BenchError("no device to run on")
        padded = [*devices, *[devices[-1]] * (RANKS - len(devices))]
        return cls(tuple(padded))

    @property
    def cuda(self) -> bool:
        """Whether ranks are on GPUs."""
        return self.devices[0].startswith("cuda")

    @property
    def processes(self) -> int:
        """How many ranks, from the first, have a GPU of their own: one process each."""
        if not self.cuda:
            return 0
        count = 0
        while count < len(self.devices) and self.devices[count] not in self.devices[:count]:
            count += 1
        return count

    @property
    def shared(self) -> bool:
        """Whether the ranks of a pair share a device."""
        return self.devices[0] == self.devices[1]
