"""An engine's channels: of boundaries, between components, and of noise predictions, to processes.

Every process has the ends of its own ranks. What lies in a channel is found by a first run, by the
process of the rank that sends it, and told to the others.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

import asyncdiff_core as core

from ..partition.partition import Partition
from ..partition.shards import Shards
from ..processes.team import Team
from ..schedule.actions import Kind
from ..schedule.plan import Plan
from .devices import Place, fabric
from .exchange.awaited import Awaited, Bundles
from .exchange.buffers import layout_of, memory_of, tensors_in
from .exchange.compression.codec import packed_layout
from .exchange.compression.ends import PackingSender, Pair, UnpackingReceiver
from .exchange.compression.sent import NOTHING_COMPRESSED, Compressed, Sent
from .exchange.credits import Credits
from .exchange.inputs import SharedInputs
from .exchange.meetings import connect
from .exchange.push import AsTheyAre, Way
from .exchange.results import (
    MODE,
    SLOTS,
    SLOTS_BETWEEN_HOSTS,
    Arrivals,
    Result,
    among_constants,
)
from .worker import Worker

#: A layout as plain data: element type, shape and strides of each tensor.
_Specs = list[tuple[str, list[int], list[int]]]
_Edge = tuple[int, int]


class Channels:
    """The fabric of ranks at ``places``, and of a *seat* for each process without any; its channels
    with ``slots`` slots. ``seats``: the own place of each process. ``compressed``: the boundaries
    that cross so."""

    def __init__(
        self,
        partition: Partition,
        places: Sequence[Place],
        seats: Sequence[Place],
        team: Team,
        slots: int,
        deadline: float | None,
        compressed: Compressed = NOTHING_COMPRESSED,
    ) -> None:
        self._partition = partition
        self._places = list(places)
        self._team = team
        self._slots = slots
        self._compressed = compressed
        #: which bundles cross compressed, if any do
        self.sent = Sent(slots) if compressed.edges else None
        self._unpacking: list[UnpackingReceiver] = []
        #: ends that are given bundles from other hosts' GPUs
        self._awaited: list[Awaited] = []
        ranks = len(places)
        owners = [place.process for place in places]
        #: of each process, the rank that noise predictions go to
        self._seats: list[int] = []
        for seat in seats:
            if seat.process not in owners:
                owners.append(seat.process)
                self._places.append(seat)
            self._seats.append(owners.index(seat.process))
        #: the rank in whose name this process acts
        self.own_rank = self._seats[team.process]
        #: ranks that deliver noise predictions
        self._delivering = range(len(partition.components) - 1, ranks)
        cuda = places[0].device.type == "cuda"
        home = self._places[self.own_rank].device
        self._stream = torch.cuda.Stream(home) if cuda and team.several else None
        self._mode = "copy" if cuda else "auto"
        self._between_hosts = len({place.host for place in self._places}) > 1
        self._result_slots = SLOTS_BETWEEN_HOSTS if self._between_hosts else SLOTS
        #: bytes of a bundle, whether its step was exact or not
        self.bundle_bytes: dict[bool, dict[_Edge, int]] = {True: {}, False: {}}
        #: by rank of another process
        self.arrivals: dict[int, Arrivals] = {}
        #: where process 0 alone gets noise predictions, the inputs that it sends to the others
        self.inputs: SharedInputs | None = None
        #: the leaves of the denoiser's result, with constants where they are constant, and which of
        #: them are tensors
        self._outputs = partition.captured.outputs
        leaves = enumerate(self._outputs)
        self._positions = tuple(i for i, leaf in leaves if isinstance(leaf, fx.Node))
        self.fabric = fabric(self._places, deadline, team)

    def connect(self, workers: Mapping[int, Worker], moving: Sequence[torch.Tensor]) -> None:
        """Find out what crosses, and make all channels; ``workers`` are this process's, by rank.
        ``moving``: inputs like those that change from step to step."""
        edges, outputs = self._first_run(workers)
        self._specs = outputs
        with self._team.collective():
            if isinstance(self._partition, Shards):
                ranks = len(self._partition.components)
                tokens = connect(self.fabric, edges, ranks, workers, self._mode)
                self.bundle_bytes = {True: tokens, False: tokens}
            else:
                for (i, j), layout in edges.items():
                    self._boundary(workers, i, j, layout)
            for worker in workers.values():
                worker.sent = self.sent
                worker.credits = Credits() if self._between_hosts else None
            if self._team.several:
                for rank in self._delivering:
                    self._result(workers, rank, outputs)
            if self._team.first_only:
                self._share(moving)

    def begin(self) -> None:
        """A generation begins, in which nothing was sent yet."""
        if self.inputs is not None:
            self.inputs.begin()
        if self.sent is not None:
            self.sent.begin()
        for receiver in self._unpacking:
            receiver.begin()
        for arrivals in self.arrivals.values():
            arrivals.begin()
        for end in self._awaited:
            end.begin()

    def record(self, plan: Plan, workers: Mapping[int, Worker]) -> None:
        """Capture every CUDA graph of these workers that ``plan`` will replay."""
        sent = Sent(self._slots) if self.sent is not None else None
        for tick in plan.ticks:
            if sent is not None:
                sent.add(tick)
            for action in tick.actions:
                worker = workers.get(action.rank)
                if worker is None:
                    continue
                if action.kind is Kind.RUN:
                    worker.prepare(action.slots if sent is None else sent.slots(action))
                elif action.kind is Kind.GET and sent is not None:
                    receiver = worker.receivers[action.component]
                    if isinstance(receiver, UnpackingReceiver):
                        with worker.current():
                            route = sent.route(action.component, action.ordinal)
                            receiver.record(action.slot, route)

    def synchronize(self) -> None:
        """Wait until all that was to arrive here has."""
        if self._stream is not None:
            self._stream.synchronize()

    def close(self) -> None:
        """Free all mailboxes. Call it when idle."""
        self.arrivals.clear()
        # Collective on GPUs, where another process may have ended.
        with contextlib.suppress(core.errors.ProcessError):
            self.fabric.close()

    # ---- what crosses ------------------------------------------------------------------------

    def _first_run(self, workers: Mapping[int, Worker]) -> tuple[dict[_Edge, core.Layout], _Specs]:
        """Run an exact step, one component after another: layouts of bundles by (from, to), and of
        what the last component returns; of ranks that share out tokens, by (from, meeting)."""
        bundles: dict[_Edge, list[torch.Tensor]] = {}
        specs: dict[_Edge, _Specs] = {}
        count = len(self._partition.components)
        outputs: _Specs = []

        def run(rank: int) -> list[Any]:
            worker = workers[rank]
            sent, leaves = worker.warm_up(self._read(worker, bundles, specs))
            if rank < count:
                bundles.update({(worker.index, target): v for target, v in sent.items()})
            tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
            return [{t: _specs_of(v) for t, v in sent.items()}, _specs_of(tensors)]

        for rank in self._partition.exact_order:
            owner = self._places[rank].process
            work = functools.partial(run, rank)
            sent, outputs = self._team.by(owner, f"run component {rank}", work)
            specs.update({(rank, int(target)): found for target, found in sent.items()})
        copies = [rank for rank in self._delivering if rank in workers and rank >= count]
        self._team.together("run its copies", lambda: [run(rank) for rank in copies] and None)
        if not isinstance(self._partition, Shards):
            assert set(specs) == set(self._partition.boundaries)
        return {edge: _layout(found) for edge, found in specs.items()}, outputs

    def _read(
        self,
        worker: Worker,
        bundles: Mapping[_Edge, list[torch.Tensor]],
        specs: Mapping[_Edge, _Specs],
    ) -> dict[int, list[torch.Tensor]]:
        """What a component reads in the first run; zeros for what another process has, or comes
        later in a circle."""
        reads = {}
        for boundary in self._partition.components[worker.index].reads:
            edge = boundary.source, boundary.target
            if edge in bundles:
                values = bundles[edge]
            elif edge in specs:
                values = [_zeros(*spec) for spec in specs[edge]]
            else:
                values = [torch.zeros_like(v.meta["val"], device="cpu") for v in boundary.values]
            reads[boundary.source] = [v.to(worker.device) for v in values]
        return reads

    # ---- channels ----------------------------------------------------------------------------

    def _boundary(self, workers: Mapping[int, Worker], i: int, j: int, layout: core.Layout) -> None:
        last = len(self._partition.components) - 1
        receivers = list(self._delivering) if j == last else [j]

        def connected(name: str, layout: core.Layout, *exact: bool) -> core.Channel:
            for kind in exact:
                self.bundle_bytes[kind][i, j] = sum(spec.nbytes for spec in layout.specs)
            # Copy engines leave the multiprocessors to the components, as in all published rows.
            return self.fabric.channel(
                i, receivers, layout, slots=self._slots, name=name, mode=self._mode
            )

        name = f"component {i} to {j}"
        less, coded = packed_layout(layout)
        if (i, j) in self._compressed.edges and any(coded):
            whole = connected(f"{name}, whole", layout, True)
            packed = connected(f"{name}, compressed", less, False)
            pair = Pair(layout, whole, packed, self._compressed.kind)
            self._packed(workers, i, j, pair, receivers)
            return
        channel = connected(name, layout, True, False)
        if i in workers:
            ways = [Way(channel, slot, layout) for slot in range(self._slots)]
            workers[i].senders[j] = ways if self.sent is None else AsTheyAre(ways)
        for r in receivers:
            if r not in workers:
                continue
            worker = workers[r]
            worker.receivers[i] = self._end(channel, i, r)
            for slot in range(self._slots):
                memory = memory_of(channel.slot(r, slot), worker.device)
                worker.mailbox[i, slot] = tensors_in(memory, layout)

    def _end(self, channel: core.Channel, sender: int, receiver: int) -> Bundles:
        """A receiver's end of a channel."""
        if self._places[sender].host == self._places[receiver].host:
            return channel
        self._awaited.append(Awaited(channel))
        return self._awaited[-1]

    def _packed(
        self,
        workers: Mapping[int, Worker],
        i: int,
        j: int,
        pair: Pair,
        receivers: Sequence[int],
    ) -> None:
        """The ends of a boundary that crosses compressed."""
        assert self.sent is not None
        if i in workers:
            with workers[i].current():
                workers[i].senders[j] = PackingSender(pair, self._slots, workers[i].device)
        for r in receivers:
            if r not in workers:
                continue
            worker = workers[r]
            ends = {True: self._end(pair.whole, i, r), False: self._end(pair.packed, i, r)}
            with worker.current():
                receiver = UnpackingReceiver(
                    pair, ends, self._slots, worker.device, r, i, self.sent, worker.graphs
                )
            worker.receivers[i] = receiver
            worker.mailbox |= {(i, slot): v for slot, v in enumerate(receiver.values)}
            self._unpacking.append(receiver)

    def _result(self, workers: Mapping[int, Worker], rank: int, outputs: _Specs) -> None:
        """The channel of the noise predictions of a rank, to every other process."""
        layout, leaves, positions = _layout(outputs), self._outputs, self._positions
        owner = self._places[rank].process
        gets = range(1) if self._team.first_only else range(self._team.count)
        receivers = [self._seats[p] for p in gets if p != owner]
        if not receivers:
            return
        channel = self.fabric.channel(
            rank,
            receivers,
            layout,
            slots=self._result_slots,
            name=f"prediction of rank {rank}",
            mode=MODE,
        )
        if rank in workers:
            workers[rank].result = Result(self.fabric, channel, layout, positions)
        elif self.own_rank in receivers:
            place = self._places[self.own_rank]
            end = self._end(channel, rank, self.own_rank)
            self.arrivals[rank] = Arrivals(
                end, layout, self.own_rank, place, leaves, positions, self._stream
            )

    def _share(self, moving: Sequence[torch.Tensor]) -> None:
        """The channel of process 0's moving inputs to all others."""
        alike = [torch.empty(t.shape, dtype=t.dtype, device="meta") for t in moving]
        layout = _layout(_specs_of(alike))
        others = self._seats[1:]
        channel = self.fabric.channel(
            self._seats[0], others, layout, slots=self._result_slots, name="inputs", mode=MODE
        )
        arrivals = None
        if self._team.process != 0:
            place, count = self._places[self.own_rank], len(moving)
            end = self._end(channel, self._seats[0], self.own_rank)
            arrivals = Arrivals(
                end, layout, self.own_rank, place, [None] * count, range(count), self._stream
            )
        self.inputs = SharedInputs(channel, arrivals, self._stream)

    def nothing(self, device: torch.device) -> list[Any]:
        """What a process is given in the place of a noise prediction that it does not get."""
        zeros = [_zeros(*spec).to(device) for spec in self._specs]
        return among_constants(self._outputs, self._positions, zeros)


def _specs_of(values: Sequence[torch.Tensor]) -> _Specs:
    return [(s.dtype, list(s.shape), list(s.strides)) for s in layout_of(values).specs]


def _layout(specs: _Specs) -> core.Layout:
    return core.Layout([core.TensorSpec(d, tuple(s), tuple(t)) for d, s, t in specs])


def _zeros(dtype: str, shape: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=getattr(torch, dtype)).zero_()
