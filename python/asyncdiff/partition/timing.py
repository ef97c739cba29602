"""Times pieces of work one after another; on a GPU behind a gate, which holds the queue back while
it fills, so that enqueueing is not what is timed."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

#: Cycles that a gate takes at first, about 2 ms, and at most: where work waits for the host, or a
#: queue is full, the queue is never there before the gate opens, however long that takes.
_SHORT, _LONG = 4_000_000, 20_000_000


def milliseconds(work: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
    """Milliseconds of each piece of work; on a GPU between events on the current stream. Pieces may
    be done several times."""
    if device.type != "cuda":
        ends = [time.perf_counter()]
        for piece in work:
            piece()
            ends.append(time.perf_counter())
        return [(b - a) * 1e3 for a, b in itertools.pairwise(ends)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(work) + 1)]

    def enqueue() -> None:
        for piece, event in zip(work, events[1:], strict=True):
            piece()
            event.record()

    _gate_of(device).hold(events[0], enqueue)
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


class Gate:
    """Holds a GPU's queue back for as long as it has taken to fill it so far: blocks of a denoiser
    are timed a hundred times, and what a gate takes too long is lost each time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cycles = _SHORT

    def hold(self, opened: torch.cuda.Event, enqueue: Callable[[], None]) -> None:
        """Enqueue behind the gate, on the current stream; again behind a longer one where it had
        ``opened``, which is recorded there, before all was there."""
        while True:
            torch.cuda.synchronize(self.device)
            torch.cuda._sleep(self.cycles)
            opened.record()
            enqueue()
            if self.cycles >= _LONG or not opened.query():
                return
            self.cycles = min(2 * self.cycles, _LONG)


_gate_of = functools.cache(Gate)
