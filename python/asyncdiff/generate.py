"""A whole generation from latents to latents: the loop that pipelines have, around a denoiser."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .config import GenerationSpec, ParallelConfig
from .errors import InputError, PlanError, SchedulerError
from .generation import Generation
from .graph.signature import Call, Role, argument_names
from .progress import bar
from .sampling.calibration import Calibration, Shape
from .sampling.clean_image import clean_image
from .sampling.fit import check_pictures, fit
from .sampling.linear import linearize
from .sampling.predictor import LatePredictor, default_order
from .sampling.scheduler import check_scheduler
from .schedule.plan import Plan

#: Called after a step with its index, its timestep and the new latents; may return others.
Callback = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None]


class Denoiser(Protocol):
    """What a generation needs of :class:`asyncdiff.AsyncDenoiser`, which documents it."""

    module: nn.Module

    @property
    def config(self) -> ParallelConfig:
        """The settings."""

    def own_modes(self) -> AbstractContextManager[None]:
        """Without the caller's modes."""

    def generation(
        self, timesteps: torch.Tensor, scheduler: Any
    ) -> AbstractContextManager[Generation]:
        """A generation with these timesteps."""

    def start(
        self, spec: GenerationSpec, *, predict: Callable[[Plan], LatePredictor]
    ) -> Generation:
        """Begin a generation."""

    def stop(self) -> None:
        """Give up the current one."""

    def plan(self, steps: int) -> Plan:
        """The plan of a generation."""

    def prepare(self, **kwargs: Any) -> None:
        """Prepare for a call."""

    def parse(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """A call, taken apart."""

    def call(self, call: Call) -> Any:
        """One step of the current generation."""


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
    timestep_argument: Callable[[torch.Tensor], torch.Tensor] | None = None
    step_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def copies(self) -> int:
        """How often the denoiser's input holds the latents."""
        return 2 if self.guidance_scale > 1 else 1


def generate(denoiser: Denoiser, request: Request) -> torch.Tensor:
    """The final latents. The caller holds the denoiser's lock."""
    with denoiser.own_modes():
        _set_timesteps(request)
        # The caller's keeps no trace of this generation: the next one may use it as it is.
        scheduler, latents = copy.deepcopy(request.scheduler), request.latents
        timesteps = check_scheduler(scheduler)
        arguments = _Arguments(denoiser, request)
        times = arguments.times(timesteps)
        scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
        dtype = latents.dtype
        with denoiser.generation(arguments.announced(timesteps, times), scheduler):
            for k, (t, time) in enumerate(zip(timesteps, times, strict=True)):
                sample = scale(torch.cat([latents] * request.copies), t)
                noise = _predicted(denoiser, request, arguments.call(sample, time)).to(dtype)
                noise = _guided(noise, request)
                out = scheduler.step(noise, t, latents, **request.step_options, return_dict=False)
                latents = out[0].to(dtype)
                if request.callback is not None:
                    latents = _or(request.callback(k, t, latents), latents)
        return latents


def _predicted(denoiser: Denoiser, request: Request, arguments: Mapping[str, Any]) -> torch.Tensor:
    """The noise prediction of the next step, of all conditions."""
    call = denoiser.parse((), arguments)
    _check_call(call)
    noise: torch.Tensor = pytree.tree_leaves(denoiser.call(call))[0]
    _check_prediction(request, noise.shape)
    return noise


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


# ---- the denoiser's arguments --------------------------------------------------------------------


class _Arguments:
    """Makes the denoiser's calls."""

    def __init__(self, denoiser: Denoiser, request: Request) -> None:
        self.request = request
        module = denoiser.module
        self._latents, self._time = argument_names(module, **denoiser.config.names)
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


# ---- calibration --------------------------------------------------------------------------------


class _Collector:
    """In place of a predictor: keeps what arrives. What a step is given meanwhile is not used."""

    def __init__(self) -> None:
        self.predictions: dict[int, torch.Tensor] = {}

    def arrived(self, step: int, z: torch.Tensor, prediction: torch.Tensor) -> None:
        """See :class:`asyncdiff.sampling.predictor.LatePredictor`."""
        self.predictions[step] = prediction.clone()
        self._like = prediction

    def predict(self, step: int, z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See :class:`asyncdiff.sampling.predictor.LatePredictor`."""
        return torch.zeros_like(self._like, dtype=dtype)


class _Run:
    """A generation whose steps somebody else takes; see :class:`asyncdiff.sampling.fit.Run`."""

    def __init__(
        self,
        denoiser: Denoiser,
        request: Request,
        arguments: _Arguments,
        exact: bool,
    ) -> None:
        self._denoiser, self._request, self._arguments = denoiser, request, arguments
        timesteps = check_scheduler(request.scheduler)
        self._times = arguments.times(timesteps)
        self._collector = _Collector()
        arriving = arguments.announced(timesteps, self._times)
        spec = denoiser.config.spec(arriving)
        if exact:
            spec = replace(spec, warmup=spec.steps, exact_tail=0)
        denoiser.start(spec, predict=lambda plan: self._collector)

    def step(self, k: int, z: torch.Tensor) -> Mapping[int, torch.Tensor]:
        """See :class:`asyncdiff.sampling.fit.Run`."""
        self._collector.predictions = {}
        sample = torch.cat([z] * self._request.copies)
        _predicted(self._denoiser, self._request, self._arguments.call(sample, self._times[k]))
        found = self._collector.predictions
        return {j: _guided(p.float(), self._request) for j, p in found.items()}


def calibrate(denoiser: Denoiser, request: Request) -> Calibration:
    """What waves of this denoiser predict best with; see :meth:`AsyncDenoiser.calibrate`."""
    config = denoiser.config
    if config.schedule != "wavefront":
        raise PlanError("only waves are calibrated: take schedule='wavefront'")
    if config.auto_warmup is not None:
        raise PlanError("a calibration is for a fixed number of exact steps: set warmup to it")
    check_pictures(request.latents)
    warmup = cast(int, config.warmup)
    with denoiser.own_modes(), bar(config.progress) as progress:
        _set_timesteps(request)
        sampler = linearize(request.scheduler, options=request.step_options)
        clean = clean_image(request.scheduler)
        arguments = _Arguments(denoiser, request)
        steps = len(clean.alpha)
        denoiser.plan(steps)  # which raises where these do not fit each other
        sample = torch.cat([request.latents] * request.copies)
        times = arguments.times(check_scheduler(request.scheduler))
        denoiser.prepare(**arguments.call(sample, times[0]))
        delay = denoiser.plan(steps).delay

        def begin(exact: bool) -> _Run:
            return _Run(denoiser, request, arguments, exact)

        try:
            return fit(
                begin,
                request.latents,
                sampler,
                clean,
                Shape(config.components, config.stride, delay, warmup, config.exact_tail),
                default_order(clean, delay, config.stride),
                lambda done, total: progress("calibrating", done, total),
            )
        finally:
            denoiser.stop()


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
