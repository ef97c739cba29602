"""A closed gate on a stream, so that enqueueing is not measured.

The gate is ``torch.cuda._sleep``: a kernel of one thread that spins for a number of clock ticks.
What is enqueued behind it waits, and begins at once when it ends. A kernel that waits for a word of
the host's would open exactly when it is told to, but would have to be written, built and loaded
beside what is measured; a clock needs nothing but a check that it was long enough. That check is
made in every round: an event right behind the gate must not have happened when everything is
enqueued. If it has, the round does not count and the gate is made twice as long.

Only rank 0's stream, on which the clock runs, has a gate. The other ranks' streams wait for what
rank 0 sends; a gate of their own could open later than rank 0's, and would then be measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .errors import BenchError

_TICKS_PER_SECOND = 2e9  # about the clock of the GPUs at hand; how exact it is does not matter
_FIRST, _LONGEST = 1e-3, 2.0  # seconds


class Gate:
    """Lets rounds begin only when they are enqueued. Its methods are collective."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        """``stream`` is that of rank 0, None in processes that do not have it."""
        self._stream = stream
        self._seconds = _FIRST
        if stream is not None:
            with torch.cuda.device(stream.device), torch.cuda.stream(stream):
                torch.cuda._sleep(1)  # loads the kernel
            stream.synchronize()

    def round(
        self,
        body: Callable[[], None],
        everyone: Callable[[bool], bool],
        settle: Callable[[], None],
    ) -> float:
        """Seconds between the gate's opening and the end of what ``body`` enqueued on the stream.

        ``everyone(x)`` is whether x holds in all processes, and waits for them; ``settle`` waits
        until nothing is in flight. Returns 0 in processes without rank 0.
        """
        while True:
            opened, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.close(opened)
            body()
            if self._stream is not None:
                done.record(self._stream)
            everyone(True)  # has enqueued everything
            held = everyone(self.held(opened))
            settle()
            if held:
                return 0.0 if self._stream is None else opened.elapsed_time(done) / 1e3
            self.longer()

    def close(self, opened: Any) -> None:
        """Close the gate; ``opened`` is the event that tells when it opens."""
        if self._stream is not None:
            with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
                torch.cuda._sleep(int(self._seconds * _TICKS_PER_SECOND))
                opened.record(self._stream)

    def held(self, opened: Any) -> bool:
        """Whether the gate is still closed."""
        return self._stream is None or not opened.query()

    def longer(self) -> None:
        """Twice as long from now on. Raises BenchError where that has not helped so far."""
        self._seconds *= 2
        if self._seconds > _LONGEST:
            self._seconds = _FIRST
            raise BenchError(f"a round could not be enqueued within {_LONGEST:.0f} s")
