"""A rank at work: it runs its component's program, and has its ends of channels."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import asyncdiff_core as core

from ..graph.compiled.ahead import Compiling
from ..graph.compiled.compile import Pieces
from ..graph.program import run_program
from ..graph.weights import Weights
from ..graph.writes import Written
from ..partition.partition import Partition
from ..progress import tell
from ..schedule.actions import NOTHING, Action, Kind, Segment
from .component_program import ComponentProgram
from .cuda_graphs import GraphCache, Issued, capturing, on_stream
from .exchange.awaited import Bundles
from .exchange.buffers import moved_on
from .exchange.caller import CallerCopies
from .exchange.compression.ends import UnpackingReceiver
from .exchange.compression.sent import Runs, Sent
from .exchange.credits import Credits
from .exchange.meetings import Meetings
from .exchange.push import Push, Way, Ways
from .exchange.results import Result
from .step import Caller, Inputs

log = logging.getLogger("asyncdiff")


class Worker:
    """A rank on its device: issues the runs of a component's ``program``, takes what they are given
    and pushes what leaves.

    Not thread-safe; one thread at a time issues its work. ``stream`` computes; ``comm`` pushes the
    boundary, beside the computation (both None on the CPU).

    ``tensors``: see :class:`~.component_program.ComponentProgram`. ``extrapolate``: of the last
    change of crossing values, how much is added to them. ``stream``: in place of one of its own,
    one whose work it shares with other workers.
    """

    def __init__(
        self,
        partition: Partition,
        rank: int,
        index: int,
        device: torch.device,
        weights: Weights,
        tensors: Sequence[torch.Tensor],
        extrapolate: float = 0.0,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        cuda = device.type == "cuda"
        self.rank = rank
        self.index = index
        self.device = device
        self.stream = stream or (torch.cuda.Stream(device) if cuda else None)
        self.comm = torch.cuda.Stream(device) if cuda else None
        self._extrapolate = extrapolate
        self.graphs = GraphCache(rank, self.stream)
        self.program = ComponentProgram(partition, index, device, weights, tensors, self.graphs)
        #: by receiving component
        self.senders: dict[int, Ways] = {}
        #: where its noise predictions go besides, if they do
        self.result: Result | None = None
        #: room on other hosts, where ranks are on several
        self.credits: Credits | None = None
        #: where tokens are shared out: its part in the meetings of all ranks
        self.meetings: Meetings | None = None
        self._meets = hasattr(self.program.main, "meet")
        #: by sending component, the channels that bring bundles
        self.receivers: dict[int, Bundles | UnpackingReceiver] = {}
        #: which bundles cross compressed, if any do
        self.sent: Sent | None = None
        #: (source, slot) -> the bundle's tensors in this rank's mailbox
        self.mailbox: dict[tuple[int, int], list[torch.Tensor]] = {}
        self._pushes, self._spent = 0, 0.0
        self._last: Issued | None = None
        self._outputs: list[Any] = []
        #: the tick that this rank has taken the caller's inputs of
        self._fed = -1
        #: the tick whose inputs it has taken before any rank of it ran
        self._ahead_of = -1
        self._copies = CallerCopies(device, self.stream)

    def current(self) -> contextlib.AbstractContextManager[Any]:
        """Makes the worker's device and compute stream the current ones, without gradients."""
        return torch.no_grad() if self.stream is None else on_stream(self.device, self.stream)

    # ---- preparation -------------------------------------------------------------------------

    def warm_up(
        self, reads: Mapping[int, list[torch.Tensor]]
    ) -> tuple[dict[int, list[torch.Tensor]], list[Any]]:
        """Run once, without channels, on bundles given by source: the bundles by target, with dense
        values (of what is given where ranks meet, without values), and the outputs."""
        sent: dict[int, list[torch.Tensor]] = {}

        def collect(target: int, index: int, value: torch.Tensor) -> None:
            # Dense, in the same order. Of tokens that are shared out only the layout counts.
            kept = torch.empty_like(value, device="meta") if self._meets else value.clone()
            sent.setdefault(target, []).append(kept)

        if self.device.type == "cuda":
            # Weights, inputs and ``reads`` were brought here on other streams.
            torch.cuda.synchronize(self.device)
        with self.current():
            self.program.warm_up()
            outputs = run_program(self.program.main, self.program.arguments(reads), collect)
        self.synchronize()
        return sent, outputs

    def pieces(self, reads: Mapping[int, list[torch.Tensor]], compiling: Compiling) -> Pieces:
        """The program in pieces, to be compiled for inputs, and bundles by source, like those that
        are there. Runs it once, without channels, where other processes compile.
        """
        told = functools.partial(tell, f"compiling rank {self.rank}")
        with self.current():
            pieces = self.program.pieces(reads, compiling, told)
        self.synchronize()
        return pieces

    def compile(self, pieces: Pieces) -> None:
        """Compile the program, which consists of these pieces. Runs it once, without channels.
        Keeps as it is what inductor cannot compile."""
        with self.current():
            refused = self.program.compile(pieces)
        if refused:
            rank = f"rank {self.rank}"
            what = f"a part of {rank}" if self.program.compiled else rank
            log.warning("%s runs uncompiled, which is slower: %s", what, refused[0])
        self.synchronize()

    def prepare(self, slots: Runs) -> None:
        """Capture the graph of a run with these slots, if it is still missing."""
        with self.current():
            self.program.rows.prepare()
            for place in range(self.result.channel.slots if slots[2] and self.result else 1):
                self.graphs.record((slots, place), functools.partial(self.execute, slots, place))
        if self.meetings is not None:
            self.meetings.check(self.graphs.used)

    def renew(self, weights: Weights, written: Written) -> bool | None:
        """Compute with the weights that the denoiser has now; whether graphs have to be recorded
        anew for that, None where it is not possible. See
        :meth:`~..graph.weights.Weights.renew`. Call when idle."""
        moved = self.program.renew(weights, written)
        if moved:  # graphs compute with what lies where it lay
            self.graphs.clear()
        return moved

    def graph_alone(self, reads: Mapping[int, list[torch.Tensor]]) -> torch.cuda.CUDAGraph:
        """A CUDA graph of the program alone, on bundles by source."""
        assert self.stream is not None
        with self.current(), capturing(self.stream) as graph:
            run_program(self.program.main, self.program.arguments(reads), None)
        return graph

    # ---- a generation ------------------------------------------------------------------------

    def begin(self, steps: int) -> None:
        """A generation of so many steps begins. Call when idle."""
        self.program.rows.begin(steps)
        if self.credits is not None:
            self.credits.begin()

    def issue(self, segment: Segment, inputs: Inputs, deliver: bool = True) -> list[Any] | None:
        """Issue a segment: its run's outputs, delivered, if they are used; else they are kept."""
        outputs = None
        if inputs.caller is not None:
            self._copies.look(inputs.caller)
        with self.current():
            for action in segment.actions:
                if action.kind is Kind.RUN:
                    outputs = self._run(action, inputs, deliver)
                elif action.kind is Kind.GET:
                    self.receivers[action.component].get(self.rank, action.slot, self.stream)
                else:
                    self.receivers[action.component].release(self.rank, action.slot, self.stream)
        return outputs

    def deliver(self, inputs: Inputs) -> list[Any]:
        """The outputs of the run that was issued last, on the caller's device."""
        with self.current():
            return self._copies.deliver(self._outputs, inputs.caller)

    def take_ahead(self, segment: Segment, inputs: Inputs) -> None:
        """Take what the segment's run is given, before ranks run that wait for this one."""
        if inputs.caller is not None:
            self._copies.look(inputs.caller)
        with self.current():
            self._accept(next(a for a in segment.actions if a.kind is Kind.RUN), inputs)
        self._ahead_of = inputs.number

    def feed(self, inputs: Inputs) -> None:
        """Take what is new of the conditioning, in a tick in which this rank does not run."""
        if inputs.caller is not None:
            self._copies.look(inputs.caller)
        with self.current():
            self._take({i: inputs.tensors[i] for i in inputs.fresh}, inputs.caller)

    def run(self, slots: Runs) -> Issued:
        """Issue one run; its outputs are valid until the next one, in order of the stream."""
        place = 0
        if self.credits is not None:
            place = self.credits.take_for(slots, self.senders, self.result)
        return self.graphs.issue((slots, place), lambda: self.execute(slots, place))

    def execute(self, slots: Runs, place: int = 0) -> Issued:
        """Run the component on the current stream, and push what leaves; results to ``place``."""
        read, write, delivers = slots
        reads: dict[int, list[torch.Tensor]] = {}
        for source, slot in read:
            bundle = self.mailbox[source, slot]
            if source in reads:
                bundle = moved_on(reads[source], bundle, self._extrapolate)
            reads[source] = bundle
        ways: dict[int, Way] = {}
        if write != NOTHING:
            for target, by_slot in self.senders.items():
                ways[target] = by_slot[write]
        result, meetings = self.result if delivers else None, self.meetings
        if not ways and result is None and meetings is None:
            return Issued(run_program(self.program.main, self.program.arguments(reads), None))
        push = Push(ways, self.stream, self.comm, result, place)
        # A copy of the last component has values for others, but only the component sends them.
        sink = meetings or (push if ways else None)
        if meetings is not None:
            meetings.begin()
        outputs = run_program(self.program.main, self.program.arguments(reads), sink)
        if meetings is not None:
            meetings.finish()
        push.finish(outputs)
        self._spent += push.spent
        self._pushes += 1
        return Issued(outputs, push.computed, push.delivered)

    def exposed_ms(self) -> float | None:
        """How long a run's pushes outlast its computation; None where not measured.

        On CUDA of the last run that was a graph; on the CPU the mean over all runs, which push
        in the thread that computes. Call when idle.
        """
        if self.device.type != "cuda":
            return self._spent / max(self._pushes, 1) * 1e3
        if self._last is None or not self.graphs.used:
            return None
        ms: float = self._last.computed.elapsed_time(self._last.delivered)
        return ms

    def synchronize(self) -> None:
        """Wait until all issued work of this rank is done."""
        if self.stream is not None:
            self.stream.synchronize()

    def close(self) -> None:
        """Drop graphs, programs with their weights, rows, inputs and mailboxes.

        Their memory is free at once: a rank refers to itself, so that only Python's collector would
        find it, and others may still refer to it. Call when idle; it cannot run any more.
        """
        self.graphs.clear()
        self.program.close()
        self._last, self._outputs = None, []
        self.mailbox.clear()
        self.receivers.clear()
        self.senders.clear()
        self.result = None
        self.meetings = None

    # ---- pieces of a run ---------------------------------------------------------------------

    def _run(self, action: Action, inputs: Inputs, deliver: bool) -> list[Any] | None:
        if self._ahead_of != inputs.number:
            self._accept(action, inputs)
        with core.nvtx_range("run", rank=self.rank, component=self.index, step=action.time):
            issued = self.run(action.slots if self.sent is None else self.sent.slots(action))
        if issued.computed is not None:
            self._last = issued
        self._outputs = issued.outputs
        now = deliver and action.step is not None
        return self._copies.deliver(issued.outputs, inputs.caller) if now else None

    def _accept(self, action: Action, inputs: Inputs) -> None:
        """Take what a run is given, and choose the row of its timestep."""
        assert action.latents is not None and action.time is not None
        earlier = inputs.earlier.get(action.latents)
        given = inputs.tensors
        mine = {i: given[i] if earlier is None else earlier[p] for p, i in self.program.moving}
        first = self._fed != inputs.number
        if first:
            self._fed = inputs.number
            for i in inputs.fresh:
                mine[i] = given[i]
        time = inputs.times[action.time]
        if isinstance(time, torch.Tensor):
            for i in self.program.times:
                mine[i] = time
        self._take(mine, inputs.caller if first else None)
        self.program.rows.select(time, inputs.version)

    def _take(self, values: dict[int, torch.Tensor], caller: Caller | None) -> None:
        """Copy denoiser inputs to this rank, by index; those that it does not use are passed over.

        The caller and this rank wait for each other here: not where nothing is copied, or the
        ranks behind the first would wait for the sampler's step too.
        """
        program = self.program
        mine = [(program.static[i], value) for i, value in values.items() if i in program.static]
        if mine and caller is not None:
            self._copies.fetch(mine, caller)
        else:
            for static, value in mine:
                static.copy_(value, non_blocking=True)
        if program.prelude is not None and not program.conditioning.isdisjoint(values):
            program.refresh()
