"""Runs plans over the components of one partition: workers, channels, ticks.

An engine belongs to one partition, one list of devices and one signature of inputs. It knows
nothing of samplers: it is given latents and times for a step, and returns noise predictions.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch

import asyncdiff_core as core

from ..errors import RankError
from ..graph.signature import Role
from ..graph.weights import Weights
from ..partition.partition import Partition
from ..progress import Progress
from ..schedule.plan import Action, Kind, Plan, Tick
from .buffers import layout_of, views
from .devices import fabric
from .executor import Inline, RankQueue, Threads
from .input_cache import InputCache
from .push import Sender
from .worker import Caller, Slots, Time, Worker

log = logging.getLogger("asyncdiff")

#: The value of the denoiser's timestep argument for a time index of the plan (None: it has none).
TimeOf = Callable[[int], Time | None]
#: The inputs of an earlier step's call, for runs that are behind (None: there are none).
InputsOf = Callable[[int], Sequence[torch.Tensor]]


class Engine:
    """Workers and channels for one partition on given devices.

    ``devices`` has one entry a rank: N + S − 1 (waves: N). ``tensors`` are the inputs of a call,
    in the order of the signature; their values are used for a first run, which fixes how values lie
    in memory. ``slots`` and ``extrapolate`` are those of the plans that will be run.
    ``compile``: compile the components, and tell it how far that is.
    """

    def __init__(
        self,
        partition: Partition,
        devices: Sequence[torch.device],
        weights: Weights,
        tensors: Sequence[torch.Tensor],
        *,
        slots: int = 2,
        extrapolate: float = 0.0,
        deadline: float | None = None,
        compile: Progress | None = None,
    ) -> None:
        self.partition = partition
        self.signature = partition.captured.signature
        self.devices = list(devices)
        self.slots = slots
        self.cuda = self.devices[0].type == "cuda"
        inputs = partition.captured.signature.inputs
        self._latents = [i for i, x in enumerate(inputs) if x.role is Role.LATENTS]
        self._times = [i for i, x in enumerate(inputs) if x.role is Role.TIMESTEP]
        count = len(partition.components)

        def weight(name: str, device: torch.device) -> torch.Tensor:
            return weights.get(partition.captured, name, device)

        self.workers: list[Worker] = []
        for rank, device in enumerate(self.devices):
            index = min(rank, count - 1)
            # A program holds its emit hook, so every rank has its own; weights are shared.
            program = partition.program(index, device, weight)
            self.workers.append(Worker.create(partition, rank, index, device, program, tensors))
            self.workers[-1].extrapolate = extrapolate
        self.conditioning = InputCache(
            [i for i, x in enumerate(inputs) if x.role is Role.CONDITIONING],
            set[int]().union(*(w.row_conditioning for w in self.workers)),
        )
        self.fabric = fabric(self.devices, deadline)
        self._connect(self._first_run())
        #: seconds that compiling took
        self.compile_s = 0.0
        if compile is not None:
            self._compile(compile)
        self._queue = RankQueue(
            Inline() if self.cuda else Threads(len(self.devices)), self.fabric.abort
        )
        self._got: dict[tuple[int, int], int] = {}
        self._freed: dict[tuple[int, int], int] = {}
        self._clean = True
        #: the plan that was prepared last
        self._ready: Plan | None = None

    # ---- preparation -------------------------------------------------------------------------

    def _first_run(self) -> dict[tuple[int, int], list[torch.Tensor]]:
        """Run an exact step, one component after another; returns all bundles by (from, to)."""
        boundaries = self.partition.boundaries
        bundles: dict[tuple[int, int], list[torch.Tensor]] = {}
        count = len(self.partition.components)
        copies = range(count, len(self.workers))
        for rank in [*self.partition.exact_order, *copies]:
            worker = self.workers[rank]
            reads = {}
            for boundary in self.partition.components[worker.index].reads:
                values = bundles.get((boundary.source, boundary.target))
                if values is None:  # the first run in a circle lacks what comes later
                    values = [
                        torch.zeros_like(v.meta["val"], device="cpu") for v in boundary.values
                    ]
                reads[boundary.source] = [v.to(worker.device) for v in values]
            sent, _ = worker.warm_up(reads)
            if rank < count:
                bundles.update({(worker.index, target): v for target, v in sent.items()})
        assert set(bundles) == set(boundaries)
        return bundles

    def _connect(self, bundles: dict[tuple[int, int], list[torch.Tensor]]) -> None:
        count = len(self.partition.components)
        self.bundle_bytes: dict[tuple[int, int], int] = {}
        for (i, j), values in bundles.items():
            layout = layout_of(values)
            self.bundle_bytes[i, j] = sum(spec.nbytes for spec in layout.specs)
            receivers = [r for r, w in enumerate(self.workers) if w.index == j]
            channel = self.fabric.channel(
                i, receivers, layout, slots=self.slots, name=f"component {i} to {j}"
            )
            self.workers[i].senders.append(Sender(j, channel, layout))
            for r in receivers:
                for slot in range(self.slots):
                    self.workers[r].mailbox[i, slot] = views(
                        channel, layout, r, slot, self.workers[r].device
                    )
        self._channels = {
            (w.index, s.target): s.channel for w in self.workers[:count] for s in w.senders
        }

    def _compile(self, progress: Progress) -> None:
        started = time.perf_counter()
        for worker in self.workers:
            what = f"compiling rank {worker.rank}"
            sources = [b.source for b in self.partition.components[worker.index].reads]
            reads = {s: worker.mailbox[s, 0] for s in sources}
            worker.compile(reads, functools.partial(progress, what))
        self.compile_s = time.perf_counter() - started

    def prepare(self, plan: Plan) -> None:
        """Capture every CUDA graph that ``plan`` will replay."""
        if not self.cuda or plan is self._ready:
            return
        for tick in plan.ticks:
            for action in tick.runs:
                self.workers[action.rank].prepare(self._slots(action))
        self._ready = plan

    def graph_alone(self, worker: Worker) -> torch.cuda.CUDAGraph:
        """A CUDA graph of a rank's component on what lies in its mailboxes, without exchange."""
        reads = self.partition.components[worker.index].reads
        return worker.graph_alone({b.source: worker.mailbox[b.source, 0] for b in reads})

    def _slots(self, action: Action) -> Slots:
        reads = tuple((source, max(ordinal, 0) % self.slots) for source, ordinal in action.reads)
        return reads, None if action.put is None else action.put % self.slots

    # ---- a generation ------------------------------------------------------------------------

    def begin(self, steps: int, tensors: Sequence[torch.Tensor]) -> None:
        """Start a generation of so many steps, whose first call has these tensors: empty channels,
        nothing in flight.

        Its conditioning is compared with that of the generation before, if rows depend on it. On
        CUDA the host waits for that, here and not later.
        """
        if not self._clean:
            self.abandon()
        for worker in self.workers:
            worker.begin(steps)
        self.conditioning.begin(tensors)
        self.fabric.reset()
        self._got.clear()
        self._freed.clear()
        self._clean = False

    def tick(
        self,
        tick: Tick,
        tensors: Sequence[torch.Tensor],
        time_of: TimeOf,
        inputs_of: InputsOf | None = None,
        caller: Caller | None = None,
    ) -> dict[int, list[Any]]:
        """Issue one tick at the latents in ``tensors``; the noise predictions by step.

        Runs of earlier steps take latents, and whatever else changes from step to step, from
        ``inputs_of``, which nobody may write to any more; without it all take them from
        ``tensors``. On CUDA the results are ready in order of the current stream of the latents'
        device. ``caller``: when all inputs are ready, if that is not what the stream is at now:
        other engines' results, which it waits for, may not be what this one has to wait for.
        """
        try:
            return self._tick(tick, tensors, time_of, inputs_of, caller)
        except BaseException:
            self.abandon()
            raise

    def _tick(
        self,
        tick: Tick,
        tensors: Sequence[torch.Tensor],
        time_of: TimeOf,
        inputs_of: InputsOf | None,
        caller: Caller | None,
    ) -> dict[int, list[Any]]:
        self.check()
        fresh = self.conditioning.changed(tensors)
        if not self.cuda:
            # The ranks' threads may still read these after the caller went on to change them.
            moving = {*self._latents, *fresh}
            tensors = [t.clone() if i in moving else t for i, t in enumerate(tensors)]
        # Before the caller's event: a time may have to be converted, on the caller's stream.
        times = {a.time: time_of(a.time) for a in tick.runs if a.time is not None}
        if self.cuda and caller is None:
            caller = Caller(tensors[self._latents[0]].device)
        done: dict[int, Future[Any]] = {}
        started: set[int] = set()
        for action in tick.actions:
            if action.kind is Kind.RUN:
                first = action.rank not in started
                started.add(action.rank)
                mine = tensors
                if inputs_of is not None and action.latents not in tick.serves[:1]:
                    assert action.latents is not None
                    mine = list(tensors)
                    for i, value in zip(self._latents, inputs_of(action.latents), strict=True):
                        mine[i] = value
                assert action.time is not None
                time = times[action.time]
                work = self._run_work(action, mine, time, fresh, caller if first else None)
            else:
                work = self._channel_work(action)
            future = self._queue.submit(action.rank, work)
            if action.step is not None:
                done[action.step] = future
        if fresh:  # ranks that did not run in this tick need the new conditioning too
            for rank in set(range(len(self.workers))) - started:
                self._queue.submit(rank, self._input_work(rank, tensors, fresh, caller))
        results = {}
        for step, future in done.items():
            if future.exception() is not None:
                self._queue.check(wait=True)
            results[step] = future.result()
        self._queue.check()
        return results

    def check(self) -> None:
        """Raise RankError for what is known to have gone wrong, without waiting."""
        self._queue.check()
        self._check_exchange()

    def finish(self) -> None:
        """Wait for the generation's last work and raise what went wrong."""
        try:
            self._queue.check(wait=True)
            self.synchronize()
            self._check_exchange()
        except BaseException:
            self.abandon()
            raise
        self._clean = True

    def _check_exchange(self) -> None:
        """Raise RankError for what went wrong on the channels, on CUDA behind the host's back."""
        try:
            self.fabric.check()
        except core.CoreError as e:
            rank = getattr(e, "rank", -1)
            raise RankError(
                rank, f"{e}. The generation was stopped; the next one starts afresh"
            ) from e

    def abandon(self) -> None:
        """Stop a generation in the middle: wait until all ranks are idle, empty the channels."""
        if not self._clean:
            self.fabric.abort(0, "the generation was abandoned")
        self._queue.settle()
        # A rank that failed may have missed its conditioning: what it computed since is of no use.
        self.conditioning.forget()
        with contextlib.suppress(Exception):  # an error of the device shows again in its next use
            self.synchronize()
        self.fabric.reset()
        self._clean = True

    def synchronize(self) -> None:
        """Wait until all ranks are idle."""
        for worker in self.workers:
            worker.synchronize()

    def exposed_ms(self) -> float | None:
        """By how long pushes outlast computation in a tick, worst rank; None if not measured."""
        values = [w.exposed_ms() for w in self.workers if w.senders]
        known = [v for v in values if v is not None]
        return max(known) if known else (0.0 if not values else None)

    def close(self) -> None:
        """Free threads, mailboxes and graphs."""
        self._queue.close()
        self.synchronize()
        for worker in self.workers:
            worker.close()
        self._channels.clear()
        self.fabric.close()

    # ---- pieces of work ----------------------------------------------------------------------

    def _run_work(
        self,
        action: Action,
        tensors: Sequence[torch.Tensor],
        time: Time | None,
        fresh: Sequence[int],
        caller: Caller | None,
    ) -> Callable[[], Any]:
        worker = self.workers[action.rank]
        slots = self._slots(action)
        version = self.conditioning.version
        caller_device = tensors[self._latents[0]].device

        def work() -> Any:
            inputs = {i: tensors[i] for i in (*self._latents, *fresh)}
            if isinstance(time, torch.Tensor):
                inputs |= dict.fromkeys(self._times, time)
            worker.set_inputs(inputs, caller)
            if time is not None:
                worker.set_time(time, version)
            about = {"rank": action.rank, "component": worker.index, "step": action.time}
            with core.nvtx_range("run", **about):
                outputs = worker.run(slots)
            return None if action.step is None else self._deliver(worker, outputs, caller_device)

        return work

    def _input_work(
        self,
        rank: int,
        tensors: Sequence[torch.Tensor],
        fresh: Sequence[int],
        caller: Caller | None,
    ) -> Callable[[], None]:
        worker = self.workers[rank]
        return lambda: worker.set_inputs({i: tensors[i] for i in fresh}, caller)

    def _channel_work(self, action: Action) -> Callable[[], None]:
        worker = self.workers[action.rank]
        channel = self._channels[action.component, worker.index]
        counts = self._got if action.kind is Kind.GET else self._freed
        key = (action.rank, action.component)
        slot = counts.get(key, 0) % self.slots
        counts[key] = counts.get(key, 0) + 1
        operation = channel.get if action.kind is Kind.GET else channel.release

        return lambda: operation(action.rank, slot, worker.stream)

    def _deliver(
        self, worker: Worker, outputs: list[Any], caller_device: torch.device
    ) -> list[Any]:
        """The outputs as new tensors on the caller's device, ready in order of its stream."""
        if worker.stream is None:  # these may lie in a mailbox, or in what the next run writes to
            return [o.clone() if _tensor(o) else o for o in outputs]
        with torch.cuda.device(caller_device):
            main = torch.cuda.current_stream(caller_device)
            out = [torch.empty_like(o, device=caller_device) if _tensor(o) else o for o in outputs]
        with worker.current():
            # The memory of ``out`` may still be in use by earlier work of the main stream.
            worker.stream.wait_stream(main)
            for new, old in zip(out, outputs, strict=True):
                if _tensor(old):
                    new.copy_(old, non_blocking=True)
        main.wait_stream(worker.stream)
        return out


def _tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
