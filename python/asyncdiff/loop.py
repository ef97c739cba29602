"""A whole generation on the ranks: the sampler's update beside the components.

Every rank that reads latents keeps its own, and takes the sampler's steps on its own device from
the predictions that the last component and its copies send it. All do the same arithmetic on the
same numbers, so that the latents are the same everywhere. On CUDA a rank's share of a tick (take
the predictions, update, take the boundary, run, send) is one graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import asyncdiff_core as core

from .calls import Role
from .clock import Clock
from .component import Caller, Recorded, Worker
from .engine import Engine
from .plan import Kind, Plan
from .predictions import Predictions
from .sampler import LinearSampler
from .segments import Op, Segment, segments
from .timetable import Timetable, fits
from .update import Update

#: Loops kept for an engine. Each holds CUDA graphs.
_KEPT = 2


@dataclass(frozen=True)
class Settings:
    """What a loop is made for; all else may change from generation to generation."""

    plan: Plan = field(hash=False)  # thousands of actions; mostly the same object again
    shape: tuple[int, ...]  #: of the latents
    dtype: torch.dtype  #: of the latents
    width: int  #: of the sampler
    guided: bool
    rescaled: bool


@dataclass
class _Seat:
    """A rank's own memory in a loop."""

    worker: Worker
    clock: Clock
    #: what the clock gives the rank in every tick: rows, or timesteps, of which a run then computes
    #: its row itself
    rows: Timetable | None
    times: torch.Tensor | None
    update: Update | None
    #: the denoiser's input, and where the update writes it (mostly the same)
    static: torch.Tensor | None
    into: torch.Tensor | None
    graphs: dict[Hashable, Recorded] = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    """A generation: ``tensors`` of the first call, ``times`` the timestep argument of every step
    (None where the denoiser has none), and what the sampler needs. ``samplers``: every rank's; all
    the same, but for waves."""

    samplers: Sequence[LinearSampler]
    latents: torch.Tensor
    tensors: Sequence[torch.Tensor]
    times: Sequence[float] | None
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0


class Loop:
    """Runs generations of one plan on one engine. Get one with :func:`loop_for`."""

    def __init__(self, engine: Engine, settings: Settings, predictions: Predictions) -> None:
        self.engine = engine
        self.settings = settings
        self._predictions = predictions
        self._prepared = False
        plan = settings.plan
        #: the first step of every tick, and of what follows the last one, for profilers
        self._first_steps = [
            *(tick.serves[0] if tick.serves else plan.steps for tick in plan.ticks),
            plan.steps,
        ]
        self._seats = [self._seat(worker) for worker in engine.workers]
        #: numbers of distinct segments: equal ones share a CUDA graph
        self._numbers: dict[Segment, int] = {}
        self._ticks = [
            [(self._numbers.setdefault(s, len(self._numbers)), s) for s in tick]
            for tick in segments(plan, predictions.readers)
        ]

    def _seat(self, worker: Worker) -> _Seat:
        settings = self.settings
        plan = settings.plan
        inputs = self.engine.partition.captured.signature.inputs
        update = into = static = None
        if worker.rank in self._predictions.readers:
            update = Update(
                settings.shape,
                settings.dtype,
                worker.device,
                len(plan.ticks) if plan.schedule == "wavefront" else plan.steps,
                settings.width,
                guided=settings.guided,
                rescaled=settings.rescaled,
            )
            (static,) = (t for i, t in worker.static.items() if inputs[i].role is Role.LATENTS)
            into = static.contiguous()  # itself, but for latents with channels last
        rows = times = target = table = None
        # What is written after the last tick is never used.
        count = len(plan.ticks) + 1
        if worker.row is not None and worker.time is not None:
            if fits(count, worker.row.nbytes):
                rows = Timetable(count, worker.row)
                target, table = worker.row.memory.view(torch.int64), rows.memory.view(torch.int64)
            else:
                target = worker.static[worker.time].view(-1)
                table = times = target.new_zeros(count, len(target))
        clock = Clock(target, table, worker.device, None if update is None else update.step)
        return _Seat(worker, clock, rows, times, update, static, into)

    def prepare(self) -> None:
        """Load every kernel and record every CUDA graph. Nothing may be in flight."""
        if not self.engine.cuda or self._prepared:
            return
        self._prepared = True
        for device in {*self.engine.devices}:
            torch.cuda.synchronize(device)  # this loop's memory was cleared on other streams
        # A kernel that is first loaded while another one waits may never arrive.
        for segment in self._numbers:
            seat = self._seats[segment.rank]
            if segment.advance is not None:
                with torch.no_grad(), seat.worker.current():
                    seat.clock.rewind()  # or the counters run past the tables' ends
                    self._update(seat, segment.advance, self._predictions.look)
        self.engine.synchronize()
        for seat in self._seats:
            seat.worker.prepare_row()
        for segment, number in self._numbers.items():
            seat = self._seats[segment.rank]
            seat.worker.record(seat.graphs, number, functools.partial(self._work, segment))

    def run(self, start: Start) -> torch.Tensor:
        """The final latents, where and in the dtype that the first ones have.

        The engine's generation must have begun; afterwards it is finished. Raises RankError.
        """
        engine = self.engine
        fresh = engine.conditioning.changed(start.tensors)
        caller = Caller(start.latents.device) if engine.cuda else None
        waiting = dict(enumerate(self._seats))

        def begin(rank: int) -> None:
            seat = waiting.pop(rank)
            engine.submit(
                rank,
                functools.partial(self._begin, seat, start, fresh, engine.conditioning.era, caller),
            )

        for step, tick in zip(self._first_steps, self._ticks, strict=True):
            engine.check()
            for number, segment in tick:
                # Each where it is needed: the others begin while the first rank computes.
                if segment.rank in waiting:
                    begin(segment.rank)
                issue = functools.partial(self._issue, number, segment, step)
                engine.submit(segment.rank, issue)
        for rank in list(waiting):
            begin(rank)
        engine.finish()
        update = self._seats[self._predictions.readers[0]].update
        assert update is not None
        return update.latents.to(start.latents.device)

    @property
    def prediction_bytes(self) -> int:
        """Bytes of predictions that ranks send to others in a generation."""
        runs = (run for tick in self.settings.plan.ticks for run in tick.runs)
        return sum(self._predictions.bytes_sent(r.rank) for r in runs if r.step is not None)

    # ---- pieces of work --------------------------------------------------------------------------

    def _begin(
        self, seat: _Seat, start: Start, fresh: Sequence[int], era: int, caller: Caller | None
    ) -> None:
        worker = seat.worker
        inputs = self.engine.partition.captured.signature.inputs
        latents = [i for i, x in enumerate(inputs) if x.role is Role.LATENTS]
        worker.set_inputs({i: start.tensors[i] for i in (*latents, *fresh)}, caller)
        times = self._times(worker.rank, start.times)
        with torch.no_grad(), worker.current():
            if seat.rows is not None:
                worker.fill(seat.rows, times, era)
            elif seat.times is not None:
                values = torch.tensor(times, dtype=seat.times.dtype)
                seat.times[:-1].copy_(values[:, None])
            seat.clock.load()
            if seat.times is not None:
                worker.compute_row()
            if seat.update is not None:
                seat.update.load(
                    start.samplers[worker.rank],
                    start.latents,
                    start.guidance_scale,
                    start.guidance_rescale,
                )

    def _times(self, rank: int, times: Sequence[float] | None) -> list[float]:
        """The timestep of every tick on a rank; that of the tick before where it does not run."""
        if times is None:
            return []
        index = 0
        out = []
        for tick in self.settings.plan.ticks:
            runs = (a.time for a in tick.runs if a.rank == rank and a.time is not None)
            index = next(runs, index)
            out.append(times[index])
        return out

    def _issue(self, number: int, segment: Segment, step: int) -> None:
        seat = self._seats[segment.rank]
        work = functools.partial(self._work, segment)
        about = {"rank": segment.rank, "component": seat.worker.index, "step": step}
        with core.nvtx_range("run", **about):
            seat.worker.issue(seat.graphs, number, work)

    def _work(self, segment: Segment) -> list[Any]:
        """Issue a segment on its rank's current stream; the component's outputs, if it runs."""
        seat = self._seats[segment.rank]
        outputs: list[Any] = []
        if segment.advance is not None:
            self._update(seat, segment.advance, self._predictions.get)
            for source, slot in segment.advance:
                self._predictions.release(segment.rank, source, slot)
        for op in segment.ops:
            outputs = self._do(seat.worker, op) or outputs
        return outputs

    def _update(
        self,
        seat: _Seat,
        advance: tuple[tuple[int, int], ...],
        get: Callable[[int, int, int], torch.Tensor],
    ) -> None:
        predictions = [get(seat.worker.rank, source, slot) for source, slot in advance]
        if seat.update is not None:
            seat.update.advance(predictions, seat.into)
            if seat.into is not None and seat.into is not seat.static:
                assert seat.static is not None
                seat.static.copy_(seat.into)
        seat.clock.advance(max(1, len(predictions)))  # no predictions: see Update.advance
        if seat.times is not None:
            seat.worker.execute_row()

    def _do(self, worker: Worker, op: Op) -> list[Any]:
        if op.kind is Kind.RUN:
            outputs = worker.execute((op.reads, op.slot))
            if op.delivers is not None:
                self._predictions.put(worker.rank, outputs[0], op.delivers)
            return outputs
        channel = self.engine.channel(op.component, worker.index)
        operation = channel.get if op.kind is Kind.GET else channel.release
        assert op.slot is not None
        operation(worker.rank, op.slot, worker.stream)
        return []


def loop_for(engine: Engine, settings: Settings) -> Loop:
    """The engine's loop for these settings: the one of an earlier generation, if it is kept."""
    loop = engine.loops.pop(settings, None)
    if loop is None:
        if engine.predictions is None:
            engine.predictions = Predictions(engine, *_prediction(engine))
        while len(engine.loops) >= _KEPT:
            del engine.loops[next(iter(engine.loops))]
        loop = Loop(engine, settings, engine.predictions)
    engine.loops[settings] = loop
    return loop


def _prediction(engine: Engine) -> tuple[tuple[int, ...], torch.dtype]:
    value = engine.partition.captured.outputs[0].meta["val"]
    return tuple(value.shape), value.dtype
