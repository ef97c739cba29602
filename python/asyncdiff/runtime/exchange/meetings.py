"""Where ranks that share out the tokens of a denoiser meet: each gives its own keys and values to
all others, and takes theirs.

What a rank gives at one place is a bundle. Bundles of the same layout go through one channel, two
slots in turn; at the end of a run an empty one follows where their number is odd, so that every
run, and every replay of a CUDA graph, begins with the same slot.

What all have given is put together in new memory; where two ranks of one process can, and write to
each other's memory directly, in the mailbox itself (:mod:`.gathering`), which has room for both
shares.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import asyncdiff_core as core

from ...environment import device_queues
from ...errors import DeviceError
from ...graph.program import joined
from .buffers import as_laid_out, memory_of, tensors_in
from .gathering import brief_meetings, in_one, whole_in

log = logging.getLogger("asyncdiff")

#: Streams of a rank: what computes, what gives, and what copies its own share beside these.
_STREAMS = 3
#: Of a channel: one bundle is read while the next one arrives.
_SLOTS = 2


@dataclass
class _Bundle:
    """A bundle that one rank gives at a meeting: its channel and the slot there; which of the
    layout's tensors are its own; ``tensors``, where these lie for a rank that takes it."""

    channel: core.Channel
    slot: int
    places: Sequence[int]
    tensors: list[torch.Tensor] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes that it gives to each other rank."""
        return sum(self.channel.layout.specs[place].nbytes for place in self.places)


@dataclass
class _Whole:
    """All of a value in a rank's mailbox, and the part of it that is the rank's own."""

    tensor: torch.Tensor
    own: torch.Tensor


class Meetings:
    """A rank's part in all meetings of a run, in the order of its program; the program's sink.

    ``stream`` computes, and waits for what others give; ``comm`` gives. Both are None on the CPU,
    where the rank's thread does. ``bundles``: by meeting, then by rank; of ranks
    that have nothing to give there is none. ``wholes``: by meeting, values that are put together in
    the mailbox; none where they are not. ``rest``: by rank, the
    channels and slots of the empty bundles at the end.
    """

    def __init__(
        self,
        rank: int,
        stream: torch.cuda.Stream | None,
        comm: torch.cuda.Stream | None,
        bundles: Sequence[Mapping[int, _Bundle]],
        wholes: Sequence[Sequence[_Whole]],
        rest: Sequence[Sequence[tuple[core.Channel, int]]],
    ) -> None:
        self._rank, self._stream, self._comm = rank, stream, comm
        self._bundles, self._wholes, self._rest = bundles, wholes, rest
        self._others = [r for r in range(len(rest)) if r != rank]
        #: how many values are put together at each meeting
        self._counts = [len(next(iter(each.values())).places) for each in bundles]
        #: copies of the rank's own share, which nothing that leaves has to wait for
        self._beside = None
        if stream is not None and any(wholes):
            self._beside = torch.cuda.Stream(stream.device)
        self._copied = False
        #: what is being copied to others, whose memory must not be used again
        self._held: list[torch.Tensor] = []
        #: the meeting whose values are still in use where they lie
        self._lent: int | None = None

    def check(self, graphs: bool) -> None:
        """Raise DeviceError where a GPU's run is no CUDA graph: ranks that are launched one after
        another would wait for what the host launches only afterwards."""
        if self._stream is not None and not graphs:
            raise DeviceError(
                f"rank {self._rank} cannot be recorded as a CUDA graph, which sharing out tokens "
                "needs: take schedule='asyncdiff' or 'wavefront', or exact_mode='chain'"
            )

    def begin(self) -> None:
        """A run begins: what one that failed had taken is nobody's any more."""
        self._lent, self._copied = None, False
        self._held.clear()

    def __call__(self, meeting: int, index: int, value: torch.Tensor) -> None:
        """Give the ``index``-th value of this rank's bundle to the others."""
        mine = self._bundles[meeting][self._rank]
        place = mine.places[index]
        value = as_laid_out(value, mine.channel.layout.specs[place])
        self._held.append(value)
        if self._comm is not None and self._stream is not None:
            self._comm.wait_stream(self._stream)
        if index == 0:
            mine.channel.begin(mine.slot, self._comm)
        mine.channel.push_pointer(place, value.data_ptr(), mine.slot, self._comm)
        if index == len(mine.places) - 1:
            mine.channel.commit(mine.slot, self._comm)
        if self._wholes[meeting]:
            if self._beside is not None and self._stream is not None:
                self._beside.wait_stream(self._stream)
            beside = self._beside
            with contextlib.nullcontext() if beside is None else torch.cuda.stream(beside):
                self._wholes[meeting][index].own.copy_(value, non_blocking=True)
            self._copied = True

    def take(self, meeting: int, index: int, value: torch.Tensor, dim: int) -> torch.Tensor:
        """All ranks' ``index``-th values, one after another along ``dim``: as a new tensor, or one
        that is good until the next meeting."""
        bundles = self._bundles[meeting]
        if index == 0:
            self._give_back()
            self._wait_for_given()
            for r, bundle in bundles.items():
                if r != self._rank:
                    bundle.channel.get(self._rank, bundle.slot, self._stream)
            self._lent = meeting
        if self._wholes[meeting]:
            return self._wholes[meeting][index].tensor
        parts = [
            value if r == self._rank else bundle.tensors[index] for r, bundle in bundles.items()
        ]
        together = value if list(bundles) == [self._rank] else joined(parts, dim, value)
        if index == self._counts[meeting] - 1:
            self._give_back()
        return together

    def finish(self) -> None:
        """The run's last meeting is over: end every channel where it began."""
        self._give_back()
        if self._comm is not None and self._stream is not None:
            self._comm.wait_stream(self._stream)
        for channel, slot in self._rest[self._rank]:
            channel.begin(slot, self._comm)
            channel.commit(slot, self._comm)
        if self._comm is not None and self._stream is not None:
            self._stream.wait_stream(self._comm)
        for r in self._others:
            for channel, slot in self._rest[r]:
                channel.get(self._rank, slot, self._stream)
                channel.release(self._rank, slot, self._stream)

    def _give_back(self) -> None:
        """What was taken last is used no more."""
        if self._lent is None:
            return
        for r, bundle in self._bundles[self._lent].items():
            if r != self._rank:
                bundle.channel.release(self._rank, bundle.slot, self._stream)
        self._lent = None

    def _wait_for_given(self) -> None:
        """Let the computation go on once all that was given has left.

        Nothing is lost by it: what others give takes as long to come. And it is needed: CUDA may
        run the branches of a graph one after another, and a rank that waited for the others before
        it has given its own would never get theirs.
        """
        if self._held and self._comm is not None and self._stream is not None:
            self._stream.wait_stream(self._comm)
            if self._beside is not None and self._copied:
                self._stream.wait_stream(self._beside)
        self._held.clear()
        self._copied = False


def connect(
    fabric: core.Fabric,
    layouts: Mapping[tuple[int, int], core.Layout],
    ranks: int,
    workers: Mapping[int, Any],
    mode: str,
) -> dict[tuple[int, int], int]:
    """Make the channels of all meetings, and give ``workers``, this process's by rank, their parts.

    ``layouts``: of bundles, by rank that gives and number of the meeting; a rank that has nothing
    for a meeting is not there. Collective among the processes that have ranks. Returns how many
    bytes go from one rank to another in a run.
    """
    meetings = 1 + max((number for _, number in layouts), default=-1)
    together: dict[int, core.Layout] = {}
    dims: dict[int, list[int]] = {}
    if ranks == len(workers) == 2 and _arrives_part_by_part(fabric):
        dims = brief_meetings([worker.program.main.graph for worker in workers.values()])
        for number, along in dims.items():
            shares = [layouts[r, number] for r in range(ranks) if (r, number) in layouts]
            if len(shares) == ranks and (layout := in_one(shares, along)) is not None:
                together[number] = layout
    by_rank = [
        _given_by(fabric, layouts, together, rank, ranks, meetings, mode) for rank in range(ranks)
    ]
    rest = [channels for _, channels in by_rank]
    for rank, worker in workers.items():
        bundles, wholes = [], []
        for number in range(meetings):
            each: dict[int, _Bundle] = {}
            whole = []
            for r, (given, _) in enumerate(by_rank):
                if number not in given:
                    continue
                bundle = given[number]
                tensors: list[torch.Tensor] = []
                if r != rank:
                    memory = memory_of(bundle.channel.slot(rank, bundle.slot), worker.device)
                    lying = tensors_in(memory, bundle.channel.layout)
                    tensors = [lying[place] for place in bundle.places]
                    if number in together:
                        whole = [
                            _Whole(*whole_in(memory, together[number], index, dim, rank))
                            for index, dim in enumerate(dims[number])
                        ]
                each[r] = _Bundle(bundle.channel, bundle.slot, bundle.places, tensors)
            bundles.append(each)
            wholes.append(whole)
        worker.meetings = Meetings(rank, worker.stream, worker.comm, bundles, wholes, rest)
    total = [sum(b.nbytes for b in given.values()) for given, _ in by_rank]
    return {(i, j): total[i] for i in range(ranks) for j in range(ranks) if i != j}


def warn_of_queues(devices: Mapping[int, torch.device]) -> None:
    """Say so where more ranks of this process, given by number, meet on one GPU than its queues can
    tell apart: what one of them has to give may come behind another's wait for it, in one queue."""
    queues = device_queues()
    sharing: dict[torch.device, list[int]] = defaultdict(list)
    for rank, device in devices.items():
        sharing[device].append(rank)
    for device, ranks in sharing.items():
        if device.type == "cuda" and len(ranks) > 1 and _STREAMS * len(ranks) > queues:
            log.warning(
                "ranks %s meet on %s and share its queues (%d): a wait in front of what would "
                "end it lasts until the deadline. Set CUDA_DEVICE_MAX_CONNECTIONS=32 before CUDA "
                "starts, or name another GPU for each rank",
                ", ".join(map(str, ranks)),
                device,
                queues,
            )


def _arrives_part_by_part(fabric: core.Fabric) -> bool:
    """Whether nothing but what was pushed is written to a mailbox: a bundle that was staged in host
    memory is copied out of it as a whole, over what the receiver has in its mailbox itself."""
    return "staged" not in fabric.links().values()


def _given_by(
    fabric: core.Fabric,
    layouts: Mapping[tuple[int, int], core.Layout],
    together: Mapping[int, core.Layout],
    rank: int,
    ranks: int,
    meetings: int,
    mode: str,
) -> tuple[dict[int, _Bundle], list[tuple[core.Channel, int]]]:
    """A rank's bundles by meeting, and its empty ones. ``together``: by meeting, layouts with the
    shares of all ranks, of which this one gives its own."""
    channels: dict[str, core.Channel] = {}
    count: Counter[str] = Counter()
    given = {}
    for number in range(meetings):
        if (rank, number) not in layouts:
            continue
        layout, places = layouts[rank, number], range(len(layouts[rank, number].specs))
        if number in together:
            layout, places = together[number], range(rank, len(layout.specs) * ranks, ranks)
        key = repr([(s.dtype, s.shape, s.strides) for s in layout.specs]) + repr(places)
        if key not in channels:
            channels[key] = fabric.channel(
                rank,
                [r for r in range(ranks) if r != rank],
                layout,
                slots=_SLOTS,
                name=f"tokens of rank {rank}, from meeting {number}",
                mode=mode,
            )
        given[number] = _Bundle(channels[key], count[key] % _SLOTS, places)
        count[key] += 1
    rest = [(channels[key], n % _SLOTS) for key, n in count.items() if n % _SLOTS]
    return given, rest
