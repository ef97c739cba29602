"""Where ranks that share out the tokens of a denoiser meet: each gives its own keys and values to
all others, and takes theirs.

What a rank gives at one place is a bundle. Bundles of the same layout go through one channel, two
slots in turn; at the end of a run an empty one follows where their number is odd, so that every
run, and every replay of a CUDA graph, begins with the same slot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import asyncdiff_core as core

from ...errors import DeviceError
from ...graph.program import joined
from .buffers import as_laid_out, memory_of, tensors_in

#: Of a channel: one bundle is read while the next one arrives.
_SLOTS = 2


@dataclass
class _Bundle:
    """A bundle that one rank gives at a meeting: its channel and the slot there; ``tensors``, where
    it lies for a rank that takes it."""

    channel: core.Channel
    layout: core.Layout
    slot: int
    tensors: list[torch.Tensor] = field(default_factory=list)


class Meetings:
    """A rank's part in all meetings of a run, in the order of its program; the program's sink.

    ``stream`` computes, and waits for what others give; ``comm`` gives. Both are None on the CPU,
    where the rank's thread does. ``bundles``: by meeting, then by rank. ``rest``: by rank, the
    channels and slots of the empty bundles at the end.
    """

    def __init__(
        self,
        rank: int,
        stream: torch.cuda.Stream | None,
        comm: torch.cuda.Stream | None,
        bundles: Sequence[Sequence[_Bundle]],
        rest: Sequence[Sequence[tuple[core.Channel, int]]],
    ) -> None:
        self._rank, self._stream, self._comm = rank, stream, comm
        self._bundles, self._rest = bundles, rest
        self._others = [r for r in range(len(rest)) if r != rank]
        #: what is being copied to others, whose memory must not be used again
        self._held: list[torch.Tensor] = []

    def check(self, graphs: bool) -> None:
        """Raise DeviceError where a GPU's run is no CUDA graph: ranks that are launched one after
        another would wait for what the host launches only afterwards."""
        if self._stream is not None and not graphs:
            raise DeviceError(
                f"rank {self._rank} cannot be recorded as a CUDA graph, which sharing out tokens "
                "needs: take schedule='asyncdiff' or 'wavefront', or exact_mode='chain'"
            )

    def __call__(self, meeting: int, index: int, value: torch.Tensor) -> None:
        """Give the ``index``-th value of this rank's bundle to the others."""
        mine = self._bundles[meeting][self._rank]
        value = as_laid_out(value, mine.layout.specs[index])
        self._held.append(value)
        if self._comm is not None and self._stream is not None:
            self._comm.wait_stream(self._stream)
        if index == 0:
            mine.channel.begin(mine.slot, self._comm)
        mine.channel.push_pointer(index, value.data_ptr(), mine.slot, self._comm)
        if index == len(mine.layout.specs) - 1:
            mine.channel.commit(mine.slot, self._comm)

    def take(self, meeting: int, index: int, value: torch.Tensor, dim: int) -> torch.Tensor:
        """All ranks' ``index``-th values, one after another along ``dim``, as a new tensor."""
        bundles = self._bundles[meeting]
        if index == 0:
            self._wait_for_given()
            for r in self._others:
                bundles[r].channel.get(self._rank, bundles[r].slot, self._stream)
        parts = [
            value if r == self._rank else bundle.tensors[index] for r, bundle in enumerate(bundles)
        ]
        together = joined(parts, dim)
        if index == len(bundles[self._rank].layout.specs) - 1:
            for r in self._others:
                bundles[r].channel.release(self._rank, bundles[r].slot, self._stream)
        return together

    def finish(self) -> None:
        """The run's last meeting is over: end every channel where it began."""
        if self._comm is not None and self._stream is not None:
            self._comm.wait_stream(self._stream)
        for channel, slot in self._rest[self._rank]:
            channel.begin(slot, self._comm)
            channel.commit(slot, self._comm)
        self._wait_for_given()
        for r in self._others:
            for channel, slot in self._rest[r]:
                channel.get(self._rank, slot, self._stream)
                channel.release(self._rank, slot, self._stream)

    def _wait_for_given(self) -> None:
        """Let the computation go on once all that was given has left.

        Nothing is lost by it: what others give takes as long to come. And it is needed: CUDA may
        run the branches of a graph one after another, and a rank that waited for the others before
        it has given its own would never get theirs.
        """
        if self._comm is not None and self._stream is not None:
            self._stream.wait_stream(self._comm)
        self._held.clear()


def connect(
    fabric: core.Fabric,
    layouts: Mapping[tuple[int, int], core.Layout],
    ranks: int,
    workers: Mapping[int, Any],
    mode: str,
) -> dict[tuple[int, int], int]:
    """Make the channels of all meetings, and give ``workers``, this process's by rank, their parts.

    ``layouts``: of bundles, by rank that gives and number of the meeting. Collective among the
    processes that have ranks. Returns how many bytes go from one rank to another in a run.
    """
    meetings = 1 + max(number for _, number in layouts)
    by_rank = [_given_by(fabric, layouts, rank, ranks, meetings, mode) for rank in range(ranks)]
    rest = [channels for _, channels in by_rank]
    for rank, worker in workers.items():
        bundles = []
        for number in range(meetings):
            each = []
            for r, (given, _) in enumerate(by_rank):
                bundle = given[number]
                tensors = [] if r == rank else _lying(bundle, rank, worker.device)
                each.append(_Bundle(bundle.channel, bundle.layout, bundle.slot, tensors))
            bundles.append(each)
        worker.meetings = Meetings(rank, worker.stream, worker.comm, bundles, rest)
    total = [sum(b.layout.nbytes for b in given) for given, _ in by_rank]
    return {(i, j): total[i] for i in range(ranks) for j in range(ranks) if i != j}


def _given_by(
    fabric: core.Fabric,
    layouts: Mapping[tuple[int, int], core.Layout],
    rank: int,
    ranks: int,
    meetings: int,
    mode: str,
) -> tuple[list[_Bundle], list[tuple[core.Channel, int]]]:
    """A rank's bundles by meeting, and its empty ones."""
    channels: dict[str, core.Channel] = {}
    count: Counter[str] = Counter()
    given = []
    for number in range(meetings):
        layout = layouts[rank, number]
        key = repr([(s.dtype, s.shape, s.strides) for s in layout.specs])
        if key not in channels:
            channels[key] = fabric.channel(
                rank,
                [r for r in range(ranks) if r != rank],
                layout,
                slots=_SLOTS,
                name=f"tokens of rank {rank}, from meeting {number}",
                mode=mode,
            )
        given.append(_Bundle(channels[key], layout, count[key] % _SLOTS))
        count[key] += 1
    rest = [(channels[key], n % _SLOTS) for key, n in count.items() if n % _SLOTS]
    return given, rest


def _lying(bundle: _Bundle, rank: int, device: torch.device) -> list[torch.Tensor]:
    """A bundle's tensors in the mailbox of a rank."""
    return tensors_in(memory_of(bundle.channel.slot(rank, bundle.slot), device), bundle.layout)
