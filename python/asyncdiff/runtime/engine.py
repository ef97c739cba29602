"""Runs plans over the components of one partition: workers, channels, ticks.

An engine belongs to one partition, one list of devices and one signature of inputs. It knows
nothing of samplers: it is given latents and times for a step, and returns noise predictions.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence
from typing import Any

import torch

import asyncdiff_core as core

from ..errors import RankError
from ..graph.signature import Role
from ..graph.weights import Weights
from ..partition.partition import Partition
from ..progress import Progress, stage
from ..schedule.actions import Tick
from ..schedule.plan import Plan
from .buffers import layout_of, memory_of, tensors_in
from .devices import fabric
from .executor import RankQueue
from .input_cache import InputCache
from .step import Caller, Earlier, Inputs, Times
from .worker import Worker


class Engine:
    """Workers and channels for one partition on given devices.

    ``devices`` has one entry a rank: N + S − 1 (waves: N). ``tensors`` are the inputs of a call,
    in the order of the signature; their values are used for a first run, which fixes how values lie
    in memory. ``slots`` and ``extrapolate`` are those of the plans that will be run.
    ``compile``: compile the components, and tell it how far that is. ``beside``: an engine whose
    ranks' streams this one's ranks use, in turn with it.
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
        beside: Engine | None = None,
    ) -> None:
        self.partition = partition
        self.signature = partition.captured.signature
        self.devices = list(devices)
        self.slots = slots
        self.cuda = self.devices[0].type == "cuda"
        self._latents = self.signature.places[Role.LATENTS]
        weight = functools.partial(weights.get, partition.captured)
        self.workers: list[Worker] = []
        for rank, device in enumerate(self.devices):
            index = min(rank, len(partition.components) - 1)
            # A program holds where its values go, so every rank has its own; weights are shared.
            program = partition.program(index, device, weight)
            stream = None if beside is None else beside.workers[rank].stream
            self.workers.append(
                Worker(partition, rank, index, device, program, tensors, extrapolate, stream)
            )
        self.conditioning = InputCache(
            self.signature.places[Role.CONDITIONING],
            set[int]().union(*(w.row_conditioning for w in self.workers)),
        )
        self.fabric = fabric(self.devices, deadline)
        self._connect(self._first_run())
        #: seconds that compiling took
        self.compile_s = 0.0
        if compile is not None:
            self._compile(compile)
        self._queue = RankQueue(len(self.devices), self.fabric.abort, threads=not self.cuda)
        self._clean = True
        #: ticks that were issued since the engine was made
        self._ticks = 0
        #: the plan that was prepared last
        self._ready: Plan | None = None

    # ---- preparation -------------------------------------------------------------------------

    def _first_run(self) -> dict[tuple[int, int], list[torch.Tensor]]:
        """Run an exact step, one component after another; returns all bundles by (from, to)."""
        boundaries = self.partition.boundaries
        bundles: dict[tuple[int, int], list[torch.Tensor]] = {}
        count = len(self.partition.components)
        for rank in [*self.partition.exact_order, *range(count, len(self.workers))]:
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
        self.bundle_bytes: dict[tuple[int, int], int] = {}
        for (i, j), values in bundles.items():
            layout = layout_of(values)
            self.bundle_bytes[i, j] = sum(spec.nbytes for spec in layout.specs)
            receivers = [r for r, w in enumerate(self.workers) if w.index == j]
            # Copy engines leave the multiprocessors to the components, as in all published rows.
            channel = self.fabric.channel(
                i,
                receivers,
                layout,
                slots=self.slots,
                name=f"component {i} to {j}",
                mode="copy" if self.cuda else "auto",
            )
            self.workers[i].senders[j] = channel, layout
            for r in receivers:
                worker = self.workers[r]
                worker.receivers[i] = channel
                for slot in range(self.slots):
                    memory = memory_of(channel.slot(r, slot), worker.device)
                    worker.mailbox[i, slot] = tensors_in(memory, layout)

    def _compile(self, progress: Progress) -> None:
        started = time.perf_counter()
        for worker in self.workers:
            what = f"compiling rank {worker.rank}"
            worker.compile(self._received(worker), functools.partial(progress, what))
        self.compile_s = time.perf_counter() - started

    def _received(self, worker: Worker) -> dict[int, list[torch.Tensor]]:
        """What lies in a rank's mailboxes, by sending component."""
        reads = self.partition.components[worker.index].reads
        return {b.source: worker.mailbox[b.source, 0] for b in reads}

    def prepare(self, plan: Plan) -> None:
        """Capture every CUDA graph that ``plan`` will replay. Raises what went wrong, a lack of
        memory too; work that no capture allows is issued as it is."""
        if not self.cuda or plan is self._ready:
            return
        for worker in self.workers:
            worker.graphs.try_again()
        with stage("recording CUDA graphs"):
            for tick in plan.ticks:
                for action in tick.runs:
                    self.workers[action.rank].prepare(action.slots)
        self._ready = plan

    def graph_alone(self, worker: Worker) -> torch.cuda.CUDAGraph:
        """A CUDA graph of a rank's component on what lies in its mailboxes, without exchange."""
        return worker.graph_alone(self._received(worker))

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
            worker.rows.begin(steps)
        self.conditioning.begin(tensors)
        self.fabric.reset()
        self._clean = False

    def tick(
        self,
        tick: Tick,
        tensors: Sequence[torch.Tensor],
        times: Times,
        earlier: Earlier,
        caller: Caller | None = None,
    ) -> dict[int, list[Any]]:
        """Issue one tick at the latents in ``tensors``; the noise predictions by step.

        ``times`` are the timestep arguments by index. Runs of steps in ``earlier`` take their
        latents, and whatever else changes from step to step, from there; nobody may write to them
        any more. On CUDA the results are ready in order of the current stream of the latents'
        device. ``caller``: when all inputs are ready, if that is not what the stream is at now:
        other engines' results, which it waits for, may not be what this one has to wait for.

        Raises RankError; the generation is abandoned then.
        """
        try:
            self.check()
            fresh = self.conditioning.changed(tensors)
            if self.cuda:
                caller = caller or Caller(tensors[self._latents[0]].device)
            else:
                # The ranks' threads may still read these after the caller went on to change them.
                moving = {*self._latents, *fresh}
                tensors = [t.clone() if i in moving else t for i, t in enumerate(tensors)]
                times = {
                    k: t.clone() if isinstance(t, torch.Tensor) else t for k, t in times.items()
                }
            self._ticks += 1
            version = self.conditioning.version
            inputs = Inputs(self._ticks, tensors, times, earlier, fresh, version, caller)
            delivered = {}
            for segment in tick.segments:
                issue = self.workers[segment.rank].issue
                submitted = self._queue.submit(segment.rank, issue, segment, inputs)
                if segment.step is not None:
                    delivered[segment.step] = submitted
            if fresh:  # ranks that did not run in this tick need the new conditioning too
                for worker in self.workers:
                    if worker.rank not in tick.ranks:
                        self._queue.submit(worker.rank, worker.feed, inputs)
            results = {step: self._queue.result(s) for step, s in delivered.items()}
            self._queue.check()
            return results
        except BaseException:
            self.abandon()
            raise

    def check(self) -> None:
        """Raise RankError for what is known to have gone wrong, without waiting; on CUDA that is
        what went wrong on the channels, behind the host's back."""
        self._queue.check()
        try:
            self.fabric.check()
        except core.CoreError as e:
            rank = getattr(e, "rank", -1)
            raise RankError(
                rank, f"{e}. The generation was stopped; the next one starts afresh"
            ) from e

    def finish(self) -> None:
        """Wait for the generation's last work and raise what went wrong: RankError, or InputError
        where conditioning was written to in a way that nothing shows."""
        try:
            self._queue.check(wait=True)
            self.synchronize()
            self.check()
            self.conditioning.check()
        except BaseException:
            self.abandon()
            raise
        self._clean = True

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

    def forget(self) -> None:
        """What was computed ahead, of the timestep and the conditioning, fits no more."""
        self.conditioning.forget()

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
        self.fabric.close()
