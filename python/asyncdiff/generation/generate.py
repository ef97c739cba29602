"""A whole generation from latents to latents: the loop that pipelines have, around a denoiser."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..config import ParallelConfig
from ..errors import InputError, PlanError, SchedulerError
from ..graph.signature import RESIDUALS, argument_names
from ..progress import bar
from ..sampling.calibration import Calibration, Shape
from ..sampling.clean_image import CleanImage, last_steps
from ..sampling.fit import Mode, check_pictures, fit
from ..sampling.linear import linearize
from ..sampling.predictor import LatePredictor
from ..sampling.scheduler import check_scheduler
from ..schedule.plan import Plan
from .generation import Generation
from .spec import GenerationSpec

#: Called after a step with its index, its timestep and the new latents; may return others.
Callback = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None]


class Denoiser(Protocol):
    """What a generation needs of :class:`asyncdiff.AsyncDenoiser`, which documents it."""

    module: nn.Module

    @property
    def config(self) -> ParallelConfig: ...

    def generation(
        self, timesteps: torch.Tensor, scheduler: Any
    ) -> AbstractContextManager[Generation]: ...

    def start(
        self,
        spec: GenerationSpec,
        clean: CleanImage | None = None,
        predict: Callable[[Plan], LatePredictor] | None = None,
    ) -> Generation: ...

    def stop(self) -> None: ...

    def plan(self, steps: int) -> Plan: ...

    def prepare(self, **kwargs: Any) -> Any: ...

    def __call__(self, **kwargs: Any) -> Any: ...


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
    step_options: Mapping[str, Any] | None = None

    def set_timesteps(self) -> None:
        """Set those of the scheduler, where any are asked for."""
        scheduler, steps, times = self.scheduler, self.num_inference_steps, self.timesteps
        device = self.latents.device
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


class _Loop:
    """A denoiser's calls in the steps of a scheduler whose timesteps are set."""

    def __init__(self, denoiser: Denoiser, request: Request, scheduler: Any) -> None:
        self._denoiser, self._request = denoiser, request
        module, rest = denoiser.module, dict(request.conditioning)
        self._latents, self._time = argument_names(module, **denoiser.config.names)
        taken = [n for n in (self._latents, self._time) if n is not None and n in rest]
        if taken:
            raise InputError(f"conditioning holds {', '.join(taken)}, which generate() passes")
        moving = [n for n in RESIDUALS if rest.get(n) is not None]
        if moving:
            raise InputError(
                f"{', '.join(moving)} change in every step: call the denoiser in your own loop"
            )
        if "return_dict" in inspect.signature(module.forward).parameters:
            rest.setdefault("return_dict", False)
        self._rest = rest
        floats = (p.dtype for p in module.parameters() if p.is_floating_point())
        self._dtype = next(floats, request.latents.dtype)
        self.timesteps = check_scheduler(scheduler)
        make = request.timestep_argument
        #: the timestep argument of every step
        self._times = [t if make is None else make(t) for t in self.timesteps]
        #: Their values, one a step; where they are views of the scheduler's timesteps, these, so
        #: that a call's argument is known without a look at its value.
        self.announced = self.timesteps
        if make is not None:
            self.announced = torch.stack([t.reshape(-1)[0] for t in self._times])

    def batch(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as often as the denoiser's input holds them."""
        return torch.cat([latents] * (2 if self._request.guidance_scale > 1 else 1))

    def arguments(self, k: int, sample: torch.Tensor) -> dict[str, Any]:
        """The denoiser's arguments in step ``k``, for an input that is scaled already."""
        inputs = {self._latents: sample.to(self._dtype)}
        if self._time is not None:
            inputs[self._time] = self._times[k]
        return inputs | self._rest

    def predicted(self, k: int, sample: torch.Tensor) -> torch.Tensor:
        """The noise prediction of step ``k``, the next one, of all conditions."""
        noise: torch.Tensor = pytree.tree_leaves(self._denoiser(**self.arguments(k, sample)))[0]
        if noise.shape != sample.shape:
            raise InputError(
                f"the denoiser returns {tuple(noise.shape)} where {tuple(sample.shape)} was due "
                f"for latents of {tuple(self._request.latents.shape)} (guidance_scale > 1 runs "
                "them twice, and conditioning then has twice their batch): call the denoiser in "
                "your own loop"
            )
        return noise

    def guided(self, noise: torch.Tensor) -> torch.Tensor:
        """The prediction that the sampler is given, of that of all conditions."""
        scale, rescale = self._request.guidance_scale, self._request.guidance_rescale
        if scale <= 1:
            return noise
        unconditional, conditional = noise.chunk(2)
        guided = unconditional + scale * (conditional - unconditional)
        if rescale > 0:
            over = tuple(range(1, guided.dim()))
            ratio = conditional.std(over, keepdim=True) / guided.std(over, keepdim=True)
            guided = rescale * (guided * ratio) + (1 - rescale) * guided
        return guided


def generate(denoiser: Denoiser, request: Request) -> torch.Tensor:
    """The final latents. The caller holds the denoiser's lock, and has left its modes."""
    request.set_timesteps()
    # The caller's keeps no trace of this generation: the next one may use it as it is.
    scheduler, latents = copy.deepcopy(request.scheduler), request.latents
    loop = _Loop(denoiser, request, scheduler)
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    dtype, options = latents.dtype, request.step_options or {}
    with denoiser.generation(loop.announced, scheduler):
        for k, t in enumerate(loop.timesteps):
            noise = loop.guided(loop.predicted(k, scale(loop.batch(latents), t)).to(dtype))
            latents = scheduler.step(noise, t, latents, **options, return_dict=False)[0].to(dtype)
            if request.callback is not None:
                other = request.callback(k, t, latents)
                latents = latents if other is None else other
    return latents


# ---- calibration --------------------------------------------------------------------------------


class _Run:
    """A generation whose steps somebody else takes; see :class:`asyncdiff.sampling.fit.Run`.

    A late one stands in place of a predictor (:class:`asyncdiff.sampling.predictor.LatePredictor`),
    and keeps what arrives. What a step is given meanwhile is not used.
    """

    def __init__(self, denoiser: Denoiser, loop: _Loop, clean: CleanImage, mode: Mode) -> None:
        self._loop, self._late = loop, mode == "late"
        self._predictions: dict[int, torch.Tensor] = {}
        spec = GenerationSpec.of(replace(denoiser.config, order=None), loop.announced)
        if mode == "exact":
            spec = replace(spec, warmup=spec.steps, exact_tail=0)
        denoiser.start(spec, clean, (lambda plan: self) if self._late else None)

    def step(self, k: int, z: torch.Tensor) -> Mapping[int, torch.Tensor]:
        """See :class:`asyncdiff.sampling.fit.Run`."""
        self._predictions = {}
        given = self._loop.predicted(k, self._loop.batch(z))
        found = self._predictions if self._late else {k: given}
        return {j: self._loop.guided(p.float()) for j, p in found.items()}

    def arrived(self, step: int, z: torch.Tensor, prediction: torch.Tensor) -> None:
        """See :class:`asyncdiff.sampling.predictor.LatePredictor`."""
        self._predictions[step] = prediction.clone()
        self._like = prediction

    def predict(self, step: int, z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See :class:`asyncdiff.sampling.predictor.LatePredictor`."""
        return torch.zeros_like(self._like, dtype=dtype)

    def exact(self, step: int, z: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        """See :class:`asyncdiff.sampling.predictor.LatePredictor`."""
        return prediction


def calibrate(denoiser: Denoiser, request: Request) -> Calibration:
    """What waves of this denoiser predict best with; see :meth:`AsyncDenoiser.calibrate`. The
    caller holds the denoiser's lock, and has left its modes."""
    config = denoiser.config
    if config.schedule != "wavefront":
        raise PlanError("only waves are calibrated: take schedule='wavefront'")
    if config.auto_warmup is not None:
        raise PlanError("a calibration is for a fixed number of exact steps: set warmup to it")
    check_pictures(request.latents)
    warmup = cast(int, config.warmup)
    with bar(config.progress) as progress:
        request.set_timesteps()
        try:
            sampler = linearize(request.scheduler, options=request.step_options)
        except SchedulerError as e:
            raise SchedulerError(
                f"{e}: a calibration needs a linear scheduler, such as DDIM, Euler, "
                "DPMSolverMultistep or FlowMatchEuler; leave order at None with others"
            ) from e
        clean = last_steps(request.scheduler, len(sampler.timesteps), request.step_options)
        loop = _Loop(denoiser, request, request.scheduler)
        steps = len(clean.alpha)
        denoiser.plan(steps)  # which raises where these do not fit each other
        denoiser.prepare(**loop.arguments(0, loop.batch(request.latents)))
        delay = denoiser.plan(steps).delay
        try:
            return fit(
                functools.partial(_Run, denoiser, loop, clean),
                request.latents,
                sampler,
                clean,
                Shape(config.components, config.stride, delay, warmup, config.exact_tail),
                lambda done, total: progress("calibrating", done, total),
            )
        finally:
            denoiser.stop()
