"""One component made ready on its device: its program, its inputs, its CUDA graphs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..graph.compile import compile_program
from ..graph.hoist import Hoisted, hoist, store
from ..graph.program import Emit
from ..graph.row import Row
from ..graph.signature import Role
from ..partition.partition import Partition
from .buffers import dense, moved_on
from .cuda_graphs import capturing
from .push import Push, Sender
from .timestep_cache import Key, TimestepCache, fits

log = logging.getLogger("asyncdiff")

#: Slots of the bundles that a run reads, by sending component (with extrapolation two, the newer
#: one first), and of the one that it writes.
Slots = tuple[tuple[tuple[int, int], ...], int | None]
#: A timestep: a number where the host knows it and all elements of the argument are alike, else
#: the argument.
Time = float | torch.Tensor
#: Among a worker's CUDA graphs, that which computes a row.
_ROW = "row"


class Caller:
    """The stream on which a tick's inputs become ready, as it is when this is made.

    It has to wait for the copies of the inputs: until then nobody may write to them, or to their
    memory once it is free.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.current_stream(device)
        # One event for all ranks: a rank must not wait for what others do with the inputs.
        self.ready = self.stream.record_event()


@dataclass
class Recorded:
    """A CUDA graph of work on one rank, and what it leaves behind."""

    graph: torch.cuda.CUDAGraph
    outputs: list[Any]
    computed: Any  # events: the last computation is done; the boundary is delivered
    delivered: Any


@dataclass
class Worker:
    """A rank's component on its device.

    Not thread-safe; one thread at a time issues its work. ``stream`` computes; ``comm`` pushes the
    boundary, beside the computation (both None on the CPU).
    """

    rank: int
    index: int
    device: torch.device
    program: fx.GraphModule
    #: computes ``kept`` from the inputs ``conditioning``, when one of them has changed
    prelude: fx.GraphModule | None
    #: computes the values of ``row`` from the input ``time`` and the inputs ``row_conditioning``
    timed: fx.GraphModule | None
    inputs: list[int]
    conditioning: set[int]
    row_conditioning: set[int]
    time: int | None
    static: dict[int, torch.Tensor]
    stream: torch.cuda.Stream | None = None
    comm: torch.cuda.Stream | None = None
    senders: list[Sender] = field(default_factory=list)
    #: (source, slot) -> the bundle's tensors in this rank's mailbox
    mailbox: dict[tuple[int, int], list[torch.Tensor]] = field(default_factory=dict)
    #: what the program needs and is computed once a generation
    kept: list[torch.Tensor] = field(default_factory=list)
    #: what the program needs of the timestep it runs at, and rows of the same generation
    row: Row | None = None
    table: TimestepCache | None = None
    #: of the last change of crossing values, how much is added to them
    extrapolate: float = 0.0
    #: CUDA graphs are used until one cannot be captured.
    graphs: bool = True
    compiled: bool = False
    _slots: int = 0
    _pushes: int = 0
    _spent: float = 0.0
    _captured: dict[Hashable, Recorded] = field(default_factory=dict)
    _last: Recorded | None = None
    _pool: Any = None
    #: streams on callers' devices, for copies from there
    _fetching: dict[torch.device, torch.cuda.Stream] = field(default_factory=dict)

    @classmethod
    def create(
        cls,
        partition: Partition,
        rank: int,
        index: int,
        device: torch.device,
        program: fx.GraphModule,
        tensors: Sequence[torch.Tensor],
    ) -> Worker:
        """A worker whose static inputs have the shapes and dtypes of ``tensors``."""
        captured = partition.captured
        inputs = [captured.inputs[n.name] for n in partition.components[index].inputs]
        with _current(device, None):
            static = {i: torch.empty_like(tensors[i], device=device) for i in inputs}
            for i in inputs:
                static[i].copy_(tensors[i])
        roles = captured.signature.inputs
        conditioning = {i for i in inputs if roles[i].role is Role.CONDITIONING}
        parts: Hoisted = hoist(program)
        worker = cls(
            rank,
            index,
            device,
            parts.main,
            parts.once,
            parts.timed,
            inputs,
            conditioning,
            {captured.inputs[name] for name in parts.conditions},
            next((i for i in inputs if roles[i].role is Role.TIMESTEP), None),
            static,
        )
        if device.type == "cuda":
            worker.stream = torch.cuda.Stream(device)
            worker.comm = torch.cuda.Stream(device)
            worker._pool = torch.cuda.graph_pool_handle()
        else:
            worker.graphs = False
        return worker

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make the worker's device and compute stream the current ones."""
        with _current(self.device, self.stream):
            yield

    def set_inputs(self, values: dict[int, torch.Tensor], caller: Caller | None = None) -> None:
        """Copy denoiser inputs to this rank, by index; those that it does not use are passed over.

        ``caller`` tells when they are ready, if they may not be yet.
        """
        mine = {i: value for i, value in values.items() if i in self.static}
        if mine:
            self._copy(mine, caller)
        self.refresh(values)

    def _copy(self, mine: dict[int, torch.Tensor], caller: Caller | None) -> None:
        """The caller and this rank wait for each other here: not where nothing is copied, or the
        ranks behind the first would wait for the sampler's step too."""
        users = [] if caller is None else [caller.stream]
        elsewhere = caller is not None and caller.stream.device != self.device
        if elsewhere and any(value.device == self.device for value in mine.values()):
            # What lies on this device, and not on the caller's, belongs to a stream of this one.
            users.append(torch.cuda.current_stream(self.device))
        with torch.no_grad(), self.current():
            if self.stream is not None and caller is not None:
                self.stream.wait_event(caller.ready)
                for stream in users[1:]:
                    self.stream.wait_stream(stream)
            with self._fetch(caller):
                for index, value in mine.items():
                    self.static[index].copy_(value, non_blocking=True)
            if self.stream is not None:
                for stream in users:
                    stream.wait_stream(self.stream)

    def _fetch(self, caller: Caller | None) -> contextlib.AbstractContextManager[Any]:
        """Within it, copies from the caller's device wait for ``caller.ready`` alone.

        Torch copies between devices on the source's current stream. That is the caller's, which
        already waits for the results of ranks whose work was issued before: this rank would then
        begin when they end.
        """
        if self.stream is None or caller is None or caller.stream.device == self.device:
            return contextlib.nullcontext()
        device = caller.stream.device
        if device not in self._fetching:
            self._fetching[device] = torch.cuda.Stream(device)
        self._fetching[device].wait_event(caller.ready)
        return torch.cuda.stream(self._fetching[device])

    def refresh(self, changed: Iterable[int]) -> None:
        """Compute again what depends on the conditioning alone, if an input of it has changed."""
        if self.prelude is None or self.conditioning.isdisjoint(changed):
            return
        with torch.no_grad(), self.current():
            self.kept = store(self._ahead(self.prelude), self.kept)

    def begin(self, steps: int) -> None:
        """Make room for the rows of a generation with so many steps. Call when idle."""
        self._slots = steps if self.row is not None and fits(steps, self.row.nbytes) else 0
        if self.table is not None and len(self.table.keys) != self._slots:
            self.table = None

    def set_time(self, time: Time, version: int) -> None:
        """Make ``row`` that of a timestep: copy it from the table, or compute it.

        ``version`` counts the changes of the conditioning. A tensor has to lie in the static input
        already.
        """
        if self.timed is None:
            return
        if isinstance(time, torch.Tensor):
            self.compute_row()
            return
        if self.table is None and self._slots:
            assert self.row is not None
            with self.current():
                self.table = TimestepCache(self._slots, self.row)
        self._take((version, time), self.table)

    def compute_row(self) -> None:
        """Compute ``row`` for the timestep in the static input."""
        self.issue(self._captured, _ROW, self.execute_row)

    def execute_row(self) -> list[Any]:
        """:meth:`compute_row` on the current stream, to be captured too."""
        assert self.timed is not None
        values = self._ahead(self.timed, self.kept)
        if self.row is None:
            self.row = Row(values)
        self.row.store(values)
        return []

    def prepare_row(self) -> None:
        """Capture the graph of :meth:`compute_row`, if it is still missing."""
        if self.timed is not None:
            self.record(self._captured, _ROW, self.execute_row)

    def warm_up(
        self, reads: dict[int, list[torch.Tensor]]
    ) -> tuple[dict[int, list[torch.Tensor]], list[Any]]:
        """Run once, without channels, on bundles given by source.

        Returns the bundles by target, with dense values, and the outputs.
        """
        sent: dict[int, list[torch.Tensor]] = {}

        def hook(target: int, index: int, value: torch.Tensor) -> None:
            sent.setdefault(target, []).append(dense(value))

        if self.device.type == "cuda":
            # Weights, inputs and ``reads`` were brought here on other streams.
            torch.cuda.synchronize(self.device)
        self.refresh(self.conditioning)
        with torch.no_grad(), self.current():
            if self.timed is not None and self.time is not None:
                self.execute_row()
                # As set_time does: kernels are loaded now, not while another rank waits.
                self.static[self.time].fill_(0)
            self._emit.hook = hook
            outputs = self.program(*self._arguments(reads))
        self.synchronize()
        return sent, outputs

    def compile(
        self, reads: dict[int, list[torch.Tensor]], progress: Callable[[int, int], None]
    ) -> None:
        """Compile the program for inputs, and bundles by source, like those that are there.

        ``progress`` is told how many of how many segments are compiled. Runs it once, without
        channels. Keeps the program as it is where inductor cannot compile it.
        """
        self._emit.hook = None
        try:
            with torch.no_grad(), self.current():
                self.program = compile_program(self.program, self._arguments(reads), progress)
            self.compiled = True
        except Exception as e:  # whatever the model does that inductor cannot take
            log.warning("rank %d runs uncompiled, which is slower: %s", self.rank, _reason(e))
        self.synchronize()

    def prepare(self, slots: Slots) -> None:
        """Capture the graph for these slots, if it is still missing."""
        self.prepare_row()
        self.record(self._captured, slots, lambda: self.execute(slots))

    def run(self, slots: Slots) -> list[Any]:
        """Issue one run. The outputs are valid until the next run, in order of the stream."""
        return self.issue(self._captured, slots, lambda: self.execute(slots))

    def record(
        self, graphs: dict[Hashable, Recorded], key: Hashable, work: Callable[[], list[Any]]
    ) -> None:
        """Capture ``work`` as ``graphs[key]``, if it is still missing and graphs are used."""
        if not self.graphs or key in graphs:
            return
        try:
            with torch.no_grad(), self.current():
                graphs[key] = self._capture(work)
        except Exception as e:  # whatever the model does that a capture forbids
            self.graphs = False
            graphs.clear()
            log.warning(
                "rank %d runs without CUDA graphs, which is slower: %s", self.rank, _reason(e)
            )

    def issue(
        self, graphs: dict[Hashable, Recorded], key: Hashable, work: Callable[[], list[Any]]
    ) -> list[Any]:
        """Issue ``work``: replay its graph, recorded now if need be, or run it."""
        with torch.no_grad(), self.current():
            self.record(graphs, key, work)
            if not self.graphs:
                return work()
            captured = graphs[key]
            if captured.computed is not None or self._last is None:
                self._last = captured
            captured.graph.replay()
            return captured.outputs

    def graph_alone(self, reads: dict[int, list[torch.Tensor]]) -> torch.cuda.CUDAGraph:
        """A CUDA graph of the program alone, on bundles by source."""
        assert self.stream is not None
        self._emit.hook = None
        with torch.no_grad(), self.current(), capturing(self.stream) as graph:
            self.program(*self._arguments(reads))
        return graph

    def execute(self, slots: Slots) -> list[Any]:
        """Run the component on the current stream, and push its boundary; returns the outputs."""
        read, write = slots
        reads: dict[int, list[torch.Tensor]] = {}
        for source, slot in read:
            bundle = self.mailbox[source, slot]
            if source in reads:
                bundle = moved_on(reads[source], bundle, self.extrapolate)
            reads[source] = bundle
        push = None
        if write is not None and self.senders:
            push = Push(self.senders, write, self.stream, self.comm)
        self._emit.hook = push
        outputs = self.program(*self._arguments(reads))
        if push is not None:
            push.finish()
            self._spent += push.spent
            self._pushes += 1
        return outputs

    def exposed_ms(self) -> float | None:
        """How long a run's pushes outlast its computation; None where not measured.

        On CUDA of the last run that was a graph; on the CPU the mean over all runs, which push
        in the thread that computes. Call when idle.
        """
        if self.device.type != "cuda":
            return self._spent / max(self._pushes, 1) * 1e3
        if self._last is None or self._last.computed is None:
            return None
        return self._last.computed.elapsed_time(self._last.delivered)

    def synchronize(self) -> None:
        """Wait until all issued work of this rank is done."""
        if self.stream is not None:
            self.stream.synchronize()

    def close(self) -> None:
        """Drop graphs, rows and mailboxes, so that their memory can be freed. Call when idle."""
        self._captured.clear()
        self.table = None
        self._last = None
        self.mailbox.clear()
        self.senders.clear()

    @property
    def _emit(self) -> Emit:
        emit = self.program.emit
        assert isinstance(emit, Emit)
        return emit

    def _arguments(self, reads: dict[int, list[torch.Tensor]]) -> list[torch.Tensor]:
        values = [self.static[i] for i in self.inputs]
        row = [] if self.row is None else self.row.values
        return [*values, *(v for bundle in reads.values() for v in bundle), *self.kept, *row]

    def _ahead(self, part: fx.GraphModule, kept: Sequence[torch.Tensor] = ()) -> Any:
        """What a part of the program returns that needs no value of other components."""
        inputs = [self.static[i] for i in self.inputs]
        reads = len(part.graph.find_nodes(op="placeholder")) - len(inputs) - len(kept)
        return part(*inputs, *[None] * reads, *kept)

    def _take(self, key: Key, table: TimestepCache | None) -> None:
        """Make ``row`` the one with this key: copy it from ``table``, or compute it, and keep it in
        the worker's own table."""
        assert self.row is not None and self.time is not None
        with torch.no_grad(), self.current():
            found = None if table is None else table.find(key)
            if found is not None:
                self.row.memory.copy_(found)
                return
            self.static[self.time].fill_(key[1])
            self.compute_row()
            if self.table is not None and table is self.table:
                self.table.put(key, self.row.memory)

    def _capture(self, work: Callable[[], list[Any]]) -> Recorded:
        assert self.stream is not None
        self._emit.hook = None
        with capturing(self.stream, self._pool) as graph:
            outputs = work()
        push = self._emit.hook
        events = (push.computed, push.delivered) if isinstance(push, Push) else (None, None)
        self._emit.hook = None
        return Recorded(graph, outputs, *events)


@contextlib.contextmanager
def _current(device: torch.device, stream: torch.cuda.Stream | None) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        if stream is None:
            yield
        else:
            with torch.cuda.stream(stream):
                yield


def _reason(e: Exception) -> str:
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
