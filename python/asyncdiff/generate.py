"""A whole generation from latents to latents: the loop that pipelines have, around an engine.

Where the scheduler is linear, the ranks run the loop themselves (:mod:`asyncdiff.loop`); else, or
if somebody wants to look at every step, the scheduler's own ``step`` is called here.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils import _pytree as pytree

from .calibrate import fit
from .calibration import Calibration, Shape
from .calls import Call, Role, argument_names
from .clean_image import clean_image
from .errors import InputError, PlanError, SchedulerError
from .generation import Generation, Phase
from .loop import Settings, Start, loop_for
from .predictor import default_order
from .progress import bar
from .sampler import LinearSampler
from .timesteps import check_scheduler
from .wave_sampler import wave_samplers

if TYPE_CHECKING:
    from .denoiser import AsyncDenoiser

log = logging.getLogger("asyncdiff")

#: Called after a step with its index, its timestep and the new latents; may return others.
Callback = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None]
UPDATES = ("auto", "linear", "scheduler")


@dataclass
class Request:
    """The arguments of :meth:`asyncdiff.AsyncDenoiser.generate`, which documents them."""

    latents: torch.Tensor
    conditioning: Mapping[str, Any]
    scheduler: Any
    num_inference_steps: int | None = None
    timesteps: Sequence[float] | torch.Tensor | None = None
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    callback: Callback | None = None
    update: str = "auto"
    timestep_argument: Callable[[torch.Tensor], torch.Tensor] | None = None
    step_options: Mapping[str, Any] = field(default_factory=dict)
    correct: bool | None = None
    drain: bool | None = None

    @property
    def copies(self) -> int:
        """How often the denoiser's input holds the latents."""
        return 2 if self.guidance_scale > 1 else 1


def generate(denoiser: AsyncDenoiser, request: Request) -> torch.Tensor:
    """The final latents. The caller holds the denoiser's lock."""
    if request.update not in UPDATES:
        raise InputError(f"update={request.update!r}: write one of {', '.join(UPDATES)}")
    if request.update == "linear" and request.callback is not None:
        raise InputError(
            "a callback sees latents between steps, which update='linear' keeps on the ranks: "
            "leave update at 'auto'"
        )
    if denoiser.schedule != "wavefront" and (request.correct or request.drain):
        raise InputError("correct and drain belong to schedule='wavefront'")
    with denoiser.own_modes():
        _set_timesteps(request)
        sampler = _sampler(denoiser, request)
        if sampler is None:
            return _by_scheduler(denoiser, request)
        return _by_ranks(denoiser, request, sampler)


def _set_timesteps(request: Request) -> None:
    scheduler, steps, times = request.scheduler, request.num_inference_steps, request.timesteps
    device = request.latents.device
    if steps is not None and times is not None:
        raise InputError("pass num_inference_steps or timesteps, not both")
    if steps is not None:
        scheduler.set_timesteps(steps, device=device)
    elif times is not None:
        try:
            listed = times.tolist() if isinstance(times, torch.Tensor) else list(times)
            scheduler.set_timesteps(timesteps=listed, device=device)
        except TypeError as e:
            raise SchedulerError(
                f"{type(scheduler).__name__} takes no list of timesteps ({e}): call its "
                "set_timesteps() yourself, and pass neither num_inference_steps nor timesteps"
            ) from e
    check_scheduler(scheduler)


def _sampler(denoiser: AsyncDenoiser, request: Request) -> LinearSampler | None:
    """The scheduler's steps, or None where its own ``step`` is to be called."""
    sampler = _linear(denoiser, request)
    if sampler is None and (request.correct or request.drain):
        raise SchedulerError(
            "correct and drain take steps again, which only linear steps on the ranks can: take a "
            "scheduler that docs/samplers.md lists, without callback, guidance='split', "
            "warmup_mode='split' and update='scheduler'; or leave both at None"
        )
    return sampler


def _linear(denoiser: AsyncDenoiser, request: Request) -> LinearSampler | None:
    if request.update == "scheduler" or request.callback is not None:
        return None
    if denoiser.splits or denoiser.auto_warmup is not None:
        if request.update == "linear":
            raise InputError(
                "update='linear' runs on one group of ranks, by a plan that is known ahead: take "
                "guidance='batched', warmup_mode='chain' and a number for warmup, or leave update "
                "at 'auto'"
            )
        return None
    try:
        return denoiser.samplers.get(request.scheduler, request.step_options)
    except SchedulerError as e:
        if request.update == "linear":
            raise
        log.info("the scheduler's own steps are used: %s", e)
        return None


# ---- the denoiser's arguments --------------------------------------------------------------------


class _Arguments:
    """Makes the denoiser's calls."""

    def __init__(self, denoiser: AsyncDenoiser, request: Request) -> None:
        self.request = request
        module = denoiser.module
        self._latents, self._time = argument_names(module, **denoiser.names)
        self._rest = dict(request.conditioning)
        taken = [n for n in (self._latents, self._time) if n is not None and n in self._rest]
        if taken:
            raise InputError(f"conditioning holds {', '.join(taken)}, which generate() passes")
        if "return_dict" in inspect.signature(module.forward).parameters:
            self._rest.setdefault("return_dict", False)
        floats = (p.dtype for p in module.parameters() if p.is_floating_point())
        self._dtype = next(floats, request.latents.dtype)

    def times(self, timesteps: torch.Tensor) -> list[torch.Tensor]:
        """The timestep argument of every step."""
        make = self.request.timestep_argument
        return [t if make is None else make(t) for t in timesteps]

    def announced(self, timesteps: torch.Tensor, times: Sequence[torch.Tensor]) -> torch.Tensor:
        """The values of ``times``, one a step; where those are views of the scheduler's timesteps,
        these, so that a call's argument is known without a look at its value."""
        if self.request.timestep_argument is None:
            return timesteps
        return torch.stack([t.reshape(-1)[0] for t in times])

    def call(self, sample: torch.Tensor, time: torch.Tensor) -> dict[str, Any]:
        """The arguments for an input that is scaled already."""
        inputs = {self._latents: sample.to(self._dtype)}
        if self._time is not None:
            inputs[self._time] = time
        return inputs | self._rest


def _check_call(call: Call) -> None:
    names = [call.signature.inputs[i].name for i in call.indices(Role.LATENTS)]
    if len(names) > 1:
        raise InputError(
            f"{', '.join(names[1:])} change in every step: call the denoiser in your own loop"
        )


def _check_prediction(request: Request, shape: Sequence[int]) -> None:
    want = (request.copies * request.latents.shape[0], *request.latents.shape[1:])
    if tuple(shape) != want:
        raise InputError(
            f"the denoiser returns {tuple(shape)} where {want} was due for latents of "
            f"{tuple(request.latents.shape)} (guidance_scale > 1 runs them twice, and "
            "conditioning then has twice their batch): call the denoiser in your own loop"
        )


# ---- two ways to run -----------------------------------------------------------------------------


def _by_ranks(denoiser: AsyncDenoiser, request: Request, sampler: LinearSampler) -> torch.Tensor:
    started = time.perf_counter()
    arguments = _Arguments(denoiser, request)
    timesteps = check_scheduler(request.scheduler)
    times = arguments.times(timesteps)
    latents = request.latents
    # In the latents' own precision, as the ranks scale all inputs that follow.
    wide = latents.to(torch.promote_types(latents.dtype, torch.float32))
    sample = torch.cat([sampler.scales[0].to(wide) * wide] * request.copies)
    call = denoiser.parse((), arguments.call(sample, times[0]))
    _check_call(call)
    waves = denoiser.schedule == "wavefront"
    drain = waves and request.drain is not False
    engine, plan = denoiser.prepared(call, len(times), drain=drain)
    _check_prediction(request, engine.partition.captured.outputs[0].meta["val"].shape)
    samplers = [sampler] * plan.ranks
    if waves:
        try:
            clean = clean_image(request.scheduler)
            rule = denoiser.rule_of(clean, plan)
            samplers = wave_samplers(sampler, clean, plan, rule, bool(request.correct))
        except SchedulerError as e:
            if request.update == "linear" or request.correct or request.drain:
                raise
            log.info("the scheduler's own steps are used: %s", e)
            return _by_scheduler(denoiser, request)
    settings = Settings(
        plan,
        tuple(latents.shape),
        latents.dtype,
        samplers[0].width,
        guided=request.copies > 1,
        rescaled=request.copies > 1 and request.guidance_rescale > 0,
    )
    loop = loop_for(engine, settings)
    loop.prepare()
    index = call.indices(Role.TIMESTEP)
    values = None
    if index:
        dtype = call.tensors[index[0]].dtype
        values = arguments.announced(timesteps, times).to("cpu", dtype)
    generation = Generation(torch.arange(len(times)) if values is None else values)
    generation.begin([Phase(engine, plan)], call, time.perf_counter() - started)
    try:
        result = loop.run(
            Start(
                samplers,
                latents,
                call.tensors,
                None if values is None else values.tolist(),
                request.guidance_scale,
                request.guidance_rescale,
            )
        )
    except BaseException:
        generation.abandon()
        raise
    generation.end(loop.prediction_bytes)
    denoiser.keep_report(generation.report())
    return result


def _by_scheduler(denoiser: AsyncDenoiser, request: Request) -> torch.Tensor:
    scheduler, latents = request.scheduler, request.latents
    timesteps = check_scheduler(scheduler)
    arguments = _Arguments(denoiser, request)
    times = arguments.times(timesteps)
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    dtype = latents.dtype
    with denoiser.generation(arguments.announced(timesteps, times), scheduler):
        for k, (t, time_) in enumerate(zip(timesteps, times, strict=True)):
            sample = scale(torch.cat([latents] * request.copies), t)
            call = denoiser.parse((), arguments.call(sample, time_))
            _check_call(call)
            noise = pytree.tree_leaves(denoiser.call(call))[0]
            _check_prediction(request, noise.shape)
            noise = _guided(noise.to(dtype), request)
            out = scheduler.step(noise, t, latents, **request.step_options, return_dict=False)
            latents = out[0].to(dtype)
            if request.callback is not None:
                latents = _or(request.callback(k, t, latents), latents)
    return latents


class _Collector:
    """In place of a predictor: keeps what arrives. What a step is given meanwhile is not used."""

    def __init__(self) -> None:
        self.predictions: dict[int, torch.Tensor] = {}

    def arrived(self, step: int, z: torch.Tensor, prediction: torch.Tensor) -> None:
        """See :class:`asyncdiff.predictor.Late`."""
        self.predictions[step] = prediction.clone()
        self._like = prediction

    def predict(self, step: int, z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See :class:`asyncdiff.predictor.Late`."""
        return torch.zeros_like(self._like, dtype=dtype)


class _Run:
    """A generation whose steps somebody else takes; see :class:`asyncdiff.calibrate.Run`."""

    def __init__(
        self,
        denoiser: AsyncDenoiser,
        request: Request,
        arguments: _Arguments,
        warmup: int,
        tail: int,
    ) -> None:
        self._denoiser, self._request, self._arguments = denoiser, request, arguments
        timesteps = check_scheduler(request.scheduler)
        self._times = arguments.times(timesteps)
        self._collector = _Collector()
        arriving = arguments.announced(timesteps, self._times)
        denoiser.warmup, denoiser.exact_tail = warmup, tail
        denoiser.start(arriving, predict=lambda plan: self._collector)

    def step(self, k: int, z: torch.Tensor) -> Mapping[int, torch.Tensor]:
        """See :class:`asyncdiff.calibrate.Run`."""
        self._collector.predictions = {}
        sample = torch.cat([z] * self._request.copies)
        call = self._denoiser.parse((), self._arguments.call(sample, self._times[k]))
        _check_call(call)
        noise = pytree.tree_leaves(self._denoiser.call(call))[0]
        _check_prediction(self._request, noise.shape)
        found = self._collector.predictions
        return {j: _guided(p.float(), self._request) for j, p in found.items()}


def calibrate(denoiser: AsyncDenoiser, request: Request) -> Calibration:
    """What waves of this denoiser predict best with; see :meth:`AsyncDenoiser.calibrate`."""
    if denoiser.schedule != "wavefront":
        raise PlanError("only waves are calibrated: take schedule='wavefront'")
    if denoiser.auto_warmup is not None:
        raise PlanError("a calibration is for a fixed number of exact steps: set warmup to it")
    warmup, tail = cast(int, denoiser.warmup), denoiser.exact_tail
    with denoiser.own_modes(), bar(denoiser.progress) as progress:
        _set_timesteps(request)
        sampler = denoiser.samplers.get(request.scheduler, request.step_options)
        clean = clean_image(request.scheduler)
        arguments = _Arguments(denoiser, request)
        steps = len(clean.alpha)
        denoiser.plan(steps)  # which raises where these do not fit each other
        sample = torch.cat([request.latents] * request.copies)
        times = arguments.times(check_scheduler(request.scheduler))
        denoiser.prepare(**arguments.call(sample, times[0]))
        delay = denoiser.plan(steps).delay

        def begin(exact: bool) -> _Run:
            ends = (steps, 0) if exact else (warmup, tail)
            return _Run(denoiser, request, arguments, *ends)

        try:
            return fit(
                begin,
                request.latents,
                sampler,
                clean,
                Shape(denoiser.components, denoiser.stride, delay, warmup, tail),
                default_order(clean, delay, denoiser.stride),
                lambda done, total: progress("calibrating", done, total),
            )
        finally:
            denoiser.stop()
            denoiser.warmup, denoiser.exact_tail = warmup, tail


def _guided(noise: torch.Tensor, request: Request) -> torch.Tensor:
    if request.copies == 1:
        return noise
    unconditional, conditional = noise.chunk(2)
    guided = unconditional + request.guidance_scale * (conditional - unconditional)
    if request.guidance_rescale > 0:
        over = tuple(range(1, guided.dim()))
        ratio = conditional.std(over, keepdim=True) / guided.std(over, keepdim=True)
        rescale = request.guidance_rescale
        guided = rescale * (guided * ratio) + (1 - rescale) * guided
    return guided


def _or(new: torch.Tensor | None, old: torch.Tensor) -> torch.Tensor:
    return old if new is None else new
