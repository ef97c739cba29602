"""Micro-batches in turn: what runs plans of the pipeline schedule.

Every micro-batch has an engine of its own, with channels, buffers and graphs, on the same devices
and weights. The engines' ranks on one device share its stream: they run in the order in which they
are issued, micro-batch by micro-batch. Each micro-batch also has a stream on the caller's device,
on which the sampler's work for it is done (:mod:`~asyncdiff.microbatches`), so that nobody
waits for what he does not need.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from ..graph.batch import BatchSplit
from ..graph.signature import Call, Role
from ..graph.writes import Seen, Writes
from ..microbatches import Layout, MicroBatched, on_stream
from ..schedule.actions import Tick
from .cfg_parallel import Groups
from .devices import Place
from .engine import Engine
from .step import READY_NOW, Earlier, Ready, Times

log = logging.getLogger("asyncdiff")

#: Values of each sample that tell whether its noise is that of another one.
_COMPARED = 64


class Pipelined(Groups):
    """Engines that take a micro-batch each, in turn, on the same devices; used as one engine is."""

    def __init__(
        self, engines: Sequence[Engine], call: Call, batched: Sequence[bool], split: BatchSplit
    ) -> None:
        super().__init__(engines, call, batched, split)
        components = len(self.partition.components)
        if split.count < components:
            log.warning(
                "schedule='pipeline' takes %d pictures to keep %d components busy, and this batch "
                "has %d",
                components,
                components,
                split.count,
            )
        home = call.tensors[self._moving[0]].device
        streams = tuple(
            torch.cuda.Stream(home) if home.type == "cuda" else None for _ in self.engines
        )
        self._layout = Layout(split.conditions, split.count, streams)
        self._writes = Writes()
        #: conditioning by place: as it was when it was cut
        self._seen: dict[int, Seen] = {}

    @property
    def places(self) -> list[Place]:
        """One entry a rank."""
        return self.engines[0].places

    @property
    def microbatches(self) -> int:
        """How many there are."""
        return self._split.count

    def bundle_bytes(self, exact: bool) -> dict[tuple[int, int], int]:
        """Bytes that cross from one component to another, of one micro-batch."""
        return self.engines[0].bundle_bytes(exact)

    def begin(self, steps: int, tensors: Sequence[torch.Tensor], ready: Ready = READY_NOW) -> None:
        """See :meth:`asyncdiff.runtime.engine.Engine.begin`."""
        self._seen.clear()
        self._writes.clear()
        super().begin(steps, tensors, ready)

    def issue(
        self,
        tick: Tick,
        tensors: Sequence[torch.Tensor],
        times: Times,
        earlier: Earlier,
        *,
        ready: Ready = READY_NOW,
    ) -> None:
        """Issue one tick, of one micro-batch; after the last one take :meth:`results`."""
        mine = tick.microbatch
        if mine == 0:
            self._taken = []
        # What the caller's own stream makes, and its memory, have to wait for the micro-batch's.
        others = [t for t in times.values() if isinstance(t, torch.Tensor)]
        parts = []
        for index, tensor in enumerate(tensors):
            found = self._ready(tensor)
            if found is None:
                tensor = tensor.joined() if isinstance(tensor, MicroBatched) else tensor
                found = self._parts_of(index, tensor)
                others.append(found[mine])
            parts.append(found[mine])
        with self._abandoned(), on_stream(self._layout.streams[mine], others):
            self.engines[mine].issue(tick, parts, self._times_of(mine, times), earlier)
            if not self._late:
                self._take(mine)

    def _take(self, group: int) -> None:
        """Take a micro-batch's results, ready in order of its stream."""
        with on_stream(self._layout.streams[group], ()):
            super()._take(group)

    def finish(self) -> None:
        """Wait for the generation's last work and raise what went wrong."""
        super().finish()
        self._writes.check()

    def _ready(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        """The parts of a tensor that lies in our micro-batches already."""
        if isinstance(tensor, MicroBatched) and tensor.cut == self._layout:
            return tensor.parts
        return None

    def _parts_of(self, index: int, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The parts, some of which are copies: they are made again where the tensor was written
        to."""
        if not self._writes.same(tensor, self._seen.get(index)):
            self._seen[index] = Seen(tensor)
            self._parts.pop(index, None)
        return super()._parts_of(index, tensor)

    def _join(self, leaves: Sequence[Any]) -> Any:
        if isinstance(leaves[0], torch.Tensor):
            return MicroBatched.of(self._layout, leaves)
        return leaves[0]


def joined(call: Call) -> Call:
    """A call whose latents may come out of another generation of micro-batches."""
    for index in call.indices(Role.LATENTS):
        tensor = call.tensors[index]
        if isinstance(tensor, MicroBatched):
            call = call.replacing(index, tensor.joined())
    return call


def split_of(call: Call, latents: int, components: int) -> BatchSplit:
    """How a call's batch is cut into micro-batches: as few as keep all components busy.

    ``latents``: the place of the latents among the call's tensors. Of a guided batch all conditions
    of a picture stay together, so that its next step waits for nobody else. With guidance each
    condition begins with the same latents: that tells how many there are, and where it misleads, a
    step waits for all of the batch.
    """
    whole = call.tensors[latents]
    batch = whole.shape[0]
    conditions = conditions_of(whole)
    pictures = batch // conditions
    count = next((m for m in range(components, pictures) if pictures % m == 0), pictures)
    return BatchSplit(conditions, count)


def conditions_of(latents: torch.Tensor) -> int:
    """How many conditions of guidance a batch begins with: each has the same latents. What lies
    beside these (the channels of an image) may differ: only the first values are compared."""
    rows = latents.flatten(1)[:, :_COMPARED]
    return next((n for n in (2, 3) if len(rows) % n == 0 and _repeats(rows, n)), 1)


def _repeats(whole: torch.Tensor, count: int) -> bool:
    first, *others = whole.chunk(count)
    return all(torch.equal(first, other) for other in others)
