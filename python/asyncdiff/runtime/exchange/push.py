"""How a component's boundary leaves it: each value as soon as it exists, beside the computation; or
all of it together with the noise prediction, at the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

import asyncdiff_core as core

from .buffers import as_laid_out
from .compression.sent import Write
from .results import Result


@dataclass(frozen=True)
class Way:
    """Where a bundle goes: the channel, its ``slot`` there, how its values lie in memory, and what
    is made of a value before it is pushed, by its index, on the stream that pushes."""

    channel: core.Channel
    slot: int
    layout: core.Layout
    change: Callable[[int, torch.Tensor], torch.Tensor] | None = None


class Ways(Protocol):
    """The ways of the bundles that runs send, by what :data:`~.compression.sent.Runs` say of them:
    a list, by slot, where none crosses compressed."""

    def __getitem__(self, write: Any, /) -> Way: ...


class AsTheyAre:
    """The ways of bundles that are not compressed, where others are."""

    def __init__(self, by_slot: Sequence[Way]) -> None:
        self._by_slot = by_slot

    def __getitem__(self, write: Any) -> Way:
        assert isinstance(write, Write)
        return self._by_slot[write.slot]


class Push:
    """The bundles of one run, by receiver: a program's sink of boundary values.

    ``stream`` computes, ``comm`` pushes; both are None on the CPU, where pushes are made at once.
    With a ``result`` to put, for other processes, into ``place``, a slot, bundles leave with it, in
    one launch.
    """

    def __init__(
        self,
        ways: Mapping[int, Way],
        stream: torch.cuda.Stream | None,
        comm: torch.cuda.Stream | None,
        result: Result | None = None,
        place: int = 0,
    ) -> None:
        self._ways = ways
        self._result, self._place = result, place
        #: by receiver, what leaves at the end
        self._late: dict[int, list[torch.Tensor]] = {target: [] for target in ways}
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
            for way in ways.values():
                way.channel.begin(way.slot, comm)
        #: Seconds of the calling thread.
        self.spent = time.perf_counter() - started

    def __call__(self, target: int, index: int, value: torch.Tensor) -> None:
        """Push one value of the bundle for ``target``."""
        way = self._ways[target]
        value = as_laid_out(value, way.layout.specs[index])
        self._held.append(value)
        started = time.perf_counter()
        late = self._result is not None
        if self._comm is not None and self._stream is not None and (way.change or not late):
            self._comm.wait_stream(self._stream)
        if way.change is not None:
            with contextlib.nullcontext() if self._comm is None else torch.cuda.stream(self._comm):
                value = way.change(index, value)
        if late:  # values come in the order of the bundle
            self._late[target].append(value)
        else:
            way.channel.push_pointer(index, value.data_ptr(), way.slot, self._comm)
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
            for way in self._ways.values():
                way.channel.commit(way.slot, self._comm)
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
        bundles = [(w.channel, self._late[t], w.slot) for t, w in self._ways.items()]
        result.fabric.put_batch([*bundles, (result.channel, values, self._place)], self._comm)


def _mark(stream: torch.cuda.Stream) -> Any:
    """A timing event that is recorded again by every replay of the graph in capture."""
    try:
        event = torch.cuda.Event(enable_timing=True, external=True)
    except TypeError:  # torch before 2.7 has no such events: exposed time is then not reported
        return None
    event.record(stream)
    return event
