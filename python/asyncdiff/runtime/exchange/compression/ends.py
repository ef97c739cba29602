"""The two ends of a bundle that may cross compressed: what a sender and a reader keep of it."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

import asyncdiff_core as core

from ...cuda_graphs import GraphCache, Issued
from ..awaited import Bundles
from ..buffers import memory_of, tensors_in
from ..push import Way
from . import reference
from .codec import packed_layout
from .sent import Route, Sent, Write

#: Kernels are those for values that begin at a multiple of so many bytes.
_ALIGNED = 16
#: Whether GPUs have kernels for it.
TRITON = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Pair:
    """The channels from one component to another, for bundles laid out as ``values``: what crosses
    ``whole``, and what crosses ``packed``, as codes of a ``kind``."""

    values: core.Layout
    whole: core.Channel
    packed: core.Channel
    kind: str


class _Kept:
    """What an end keeps: the last bundles as their reader has them, by slot, whose number is that
    of the plan's rings."""

    def __init__(self, pair: Pair, slots: int, device: torch.device) -> None:
        self._kind = pair.kind
        self._layout, self._coded = packed_layout(pair.values)
        self._codec: Any = reference
        if device.type == "cuda" and TRITON:
            from . import kernels

            self._codec = kernels
        nbytes = pair.values.nbytes
        memory = [torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(slots)]
        #: by slot, a bundle's values
        self.values = [tensors_in(m, pair.values) for m in memory]
        self._flat = [[_flat(v) for v in bundle] for bundle in self.values]

    def _encode(self, index: int, value: torch.Tensor, slot: int, packed: torch.Tensor) -> None:
        last, older = self._flat[slot - 1][index], self._flat[slot - 2][index]
        new = self._flat[slot][index]
        self._codec.encode(_flat(value), last, older, new, packed, self._kind)

    def _decode(self, index: int, packed: torch.Tensor, slot: int) -> None:
        last, older = self._flat[slot - 1][index], self._flat[slot - 2][index]
        self._codec.decode(packed, last, older, self._flat[slot][index], self._kind)

    def _keep(self, index: int, value: torch.Tensor, slot: int, route: Route) -> None:
        """Take a value as it is: at the beginning as if it had always been so."""
        for kept in self.values if route.first else self.values[slot : slot + 1]:
            kept[index].copy_(value, non_blocking=True)


class PackingSender(_Kept):
    """A sender's end, on its ``device``. It computes on the current stream."""

    def __init__(self, pair: Pair, slots: int, device: torch.device) -> None:
        super().__init__(pair, slots, device)
        self._pair = pair
        memory = torch.zeros(self._layout.nbytes, dtype=torch.uint8, device=device)
        self._packed = tensors_in(memory, self._layout)
        for index in self._those_coded():  # kernels are loaded now, not while ranks wait
            self._encode(index, self.values[0][index], 0, self._packed[index])

    def _those_coded(self) -> list[int]:
        return [i for i, coded in enumerate(self._coded) if coded]

    def __getitem__(self, write: Any) -> Way:
        """The way of the bundle that a run sends; see :class:`~.sent.Write`."""
        assert isinstance(write, Write)
        pair, (slot, route) = self._pair, write
        work = self._whole if route.whole else self._pack
        change = functools.partial(work, slot, route)
        return Way(pair.whole if route.whole else pair.packed, route.slot, pair.values, change)

    def _whole(self, slot: int, route: Route, index: int, value: torch.Tensor) -> torch.Tensor:
        if self._coded[index]:
            self._keep(index, value, slot, route)
        return value

    def _pack(self, slot: int, route: Route, index: int, value: torch.Tensor) -> torch.Tensor:
        if not self._coded[index]:
            return value
        if value.is_cuda and value.data_ptr() % _ALIGNED:  # for which no kernel is loaded
            value = value.clone()
        self._encode(index, value, slot, self._packed[index])
        return self._packed[index]


class UnpackingReceiver(_Kept):
    """A reader's end, of a rank on its ``device``, in the place of the channel from component
    ``source``: what was taken is unpacked into memory of its own, and given back at once.

    ``channels``: the rank's ends of those of the pair, by whether bundles are whole. ``sent`` knows
    the bundles' routes. What it computes on the rank's stream are ``graphs``.
    """

    def __init__(
        self,
        pair: Pair,
        channels: Mapping[bool, Bundles],
        slots: int,
        device: torch.device,
        rank: int,
        source: int,
        sent: Sent,
        graphs: GraphCache,
    ) -> None:
        super().__init__(pair, slots, device)
        self._source, self._sent, self._graphs = source, sent, graphs
        self._channels = channels
        layouts = {True: pair.values, False: self._layout}
        self._mailbox = {
            whole: [
                tensors_in(memory_of(channel.slot(rank, slot), device), layouts[whole])
                for slot in range(slots)
            ]
            for whole, channel in self._channels.items()
        }
        self._taken = 0
        for index, coded in enumerate(self._coded):
            if coded:
                self._decode(index, self._mailbox[False][0][index], 0)

    def begin(self) -> None:
        """Nothing was taken yet."""
        self._taken = 0

    def get(self, rank: int, slot: int, stream: torch.cuda.Stream | None) -> None:
        """Wait for the next bundle, and unpack it into what is kept of ``slot``."""
        route = self._sent.route(self._source, self._taken)
        self._taken += 1
        channel = self._channels[route.whole]
        channel.get(rank, route.slot, stream)
        self._graphs.issue(self._key(slot, route), functools.partial(self._take, slot, route))
        channel.release(rank, route.slot, stream)

    def release(self, rank: int, slot: int, stream: torch.cuda.Stream | None) -> None:
        """Nothing: it was given back when it was taken."""

    def record(self, slot: int, route: Route) -> None:
        """Capture the graph of such a bundle, if it is still missing."""
        self._graphs.record(self._key(slot, route), functools.partial(self._take, slot, route))

    def _key(self, slot: int, route: Route) -> tuple[Any, ...]:
        return "unpack", self._source, slot, route

    def _take(self, slot: int, route: Route) -> Issued:
        for index, value in enumerate(self._mailbox[route.whole][route.slot]):
            if route.whole:
                self._keep(index, value, slot, route)
            elif self._coded[index]:
                self._decode(index, value, slot)
            else:
                self.values[slot][index].copy_(value, non_blocking=True)
        return Issued([])


def _flat(value: torch.Tensor) -> torch.Tensor:
    """A dense tensor's elements in the order of memory."""
    return value.as_strided((value.numel(),), (1,))
