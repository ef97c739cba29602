"""How a component's boundary leaves it: each value as soon as it exists, beside the computation; or
all of it together with the noise prediction, at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import asyncdiff_core as core

from .buffers import as_laid_out
from .results import Result

#: Where values for one other component go, and how they lie there.
Sender = tuple[core.Channel, core.Layout]


class Push:
    """The bundles of one run, by receiver: a program's sink of boundary values.

    ``stream`` computes, ``comm`` pushes; both are None on the CPU, where pushes are made at once.
    With a ``result`` to put, for other processes, bundles leave with it, in one launch.
    """

    def __init__(
        self,
        senders: Mapping[int, Sender],
        slot: int,
        stream: torch.cuda.Stream | None,
        comm: torch.cuda.Stream | None,
        result: Result | None = None,
    ) -> None:
        self._senders = senders
        self._slot = slot
        self._result = result
        #: by receiver, what leaves at the end
        self._late: dict[int, list[torch.Tensor]] = {target: [] for target in senders}
        self._stream = stream
        self._comm = comm
        # The pushes read these values beside the computation, which must not reuse their memory.
        self._held: list[torch.Tensor] = []
        #: Events, once finished: all is computed; all has arrived.
        self.computed: Any = None
        self.delivered: Any = None
        started = time.perf_counter()
        if comm is not None and stream is not None:
            comm.wait_stream(stream)
        if result is None:
            for channel, _ in senders.values():
                channel.begin(slot, comm)
        #: Seconds of the calling thread.
        self.spent = time.perf_counter() - started

    def __call__(self, target: int, index: int, value: torch.Tensor) -> None:
        """Push one value of the bundle for ``target``."""
        channel, layout = self._senders[target]
        value = as_laid_out(value, layout.specs[index])
        self._held.append(value)
        if self._result is not None:  # values come in the order of the bundle
            self._late[target].append(value)
            return
        started = time.perf_counter()
        if self._comm is not None and self._stream is not None:
            self._comm.wait_stream(self._stream)
        channel.push_pointer(index, value.data_ptr(), self._slot, self._comm)
        self.spent += time.perf_counter() - started

    def finish(self, outputs: Sequence[Any]) -> None:
        """All values were pushed, or are there to be put with what is delivered of ``outputs``:
        tell the receivers, and let the computation's stream wait."""
        started = time.perf_counter()
        if self._stream is not None:
            self.computed = _mark(self._stream)
        if self._result is not None:
            self._put(self._result, outputs)
        else:
            for channel, _ in self._senders.values():
                channel.commit(self._slot, self._comm)
        if self._comm is not None and self._stream is not None:
            self._stream.wait_stream(self._comm)
            self.delivered = _mark(self._stream)
        self._held.clear()
        self._late.clear()
        self.spent += time.perf_counter() - started

    def _put(self, result: Result, outputs: Sequence[Any]) -> None:
        values = result.values(outputs)
        self._held += values
        if self._comm is not None and self._stream is not None:
            self._comm.wait_stream(self._stream)
        bundles = [(c, self._late[t], self._slot) for t, (c, _) in self._senders.items()]
        result.fabric.put_batch([*bundles, (result.channel, values, 0)], self._comm)


def _mark(stream: torch.cuda.Stream) -> Any:
    """A timing event that is recorded again by every replay of the graph in capture."""
    try:
        event = torch.cuda.Event(enable_timing=True, external=True)
    except TypeError:  # torch before 2.7 has no such events: exposed time is then not reported
        return None
    event.record(stream)
    return event
