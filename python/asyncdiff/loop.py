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
from .update import Update

#: Loops kept for an engine. Each holds CUDA graphs.
_KEPT = 2


@dataclass(frozen=True)
class Settings:
    """What a loop is made for; all else may change from generation to generation."""

    plan: Plan
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
    update: Update | None
    #: the denoiser's input, and where the update writes it (mostly the same)
    static: torch.Tensor | None
    into: torch.Tensor | None
    graphs: dict[Hashable, Recorded] = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    """A generation: ``tensors`` of the first call, ``times`` the timestep argument of every step
    (on the CPU), and what the sampler needs. ``samplers``: every rank's; all the same, but for
    waves."""

    samplers: Sequence[LinearSampler]
    latents: torch.Tensor
    tensors: Sequence[torch.Tensor]
    times: torch.Tensor | None
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
        targets = [t for i, t in worker.static.items() if inputs[i].role is Role.TIMESTEP]
        step = None if update is None else update.step
        clock = Clock(targets, len(plan.ticks), worker.device, step)
        return _Seat(worker, clock, update, static, into)

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
        for segment, number in self._numbers.items():
            seat = self._seats[segment.rank]
            seat.worker.record(seat.graphs, number, functools.partial(self._work, segment))

    def run(self, start: Start) -> torch.Tensor:
        """The final latents, where and in the dtype that the first ones have.

        The engine's generation must have begun; afterwards it is finished. Raises RankError.
        """
        engine = self.engine
        caller = Caller(start.latents.device) if engine.cuda else None
        for seat in self._seats:
            engine.submit(seat.worker.rank, functools.partial(self._begin, seat, start, caller))
        for step, tick in zip(self._first_steps, self._ticks, strict=True):
            engine.check()
            for number, segment in tick:
                issue = functools.partial(self._issue, number, segment, step)
                engine.submit(segment.rank, issue)
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

    def _begin(self, seat: _Seat, start: Start, caller: Caller | None) -> None:
        worker = seat.worker
        worker.set_inputs(dict(enumerate(start.tensors)), caller)
        with torch.no_grad(), worker.current():
            seat.clock.load(self._times(worker.rank, start.times))
            if seat.update is not None:
                seat.update.load(
                    start.samplers[worker.rank],
                    start.latents,
                    start.guidance_scale,
                    start.guidance_rescale,
                )

    def _times(self, rank: int, times: torch.Tensor | None) -> torch.Tensor | None:
        """The timestep of every tick on a rank; any where it does not run."""
        if times is None:
            return None
        indices = []
        for tick in self.settings.plan.ticks:
            runs = (a.time for a in tick.runs if a.rank == rank)
            indices.append(next(runs, None) or 0)
        return times[indices]

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
