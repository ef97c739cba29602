"""The clean image that a prediction means, by the scheduler's own noise schedule.

A denoiser's input is z = α·x0 + σ·ε, with α and σ of its step; what it predicts is a linear mix of
the same two: ε itself, x0 (*sample*), v = α·ε − σ·x0 (Salimans and Ho 2022) or ε − x0 (*flow*). So
x0 is a weighted sum of z and of the prediction, and the prediction one of z and x0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import SchedulerError
from .response import Response, respond
from .scheduler import check_order, check_scheduler

#: Below this share of the prediction in x0, or above its inverse, the two cannot be told apart.
_TINY = 1e-8
#: By so much a sampler's noise levels may be others than its timesteps say, for these are rounded.
_OFF = 0.1


@dataclass(frozen=True)
class CleanImage:
    """At step k: x0 = ``of_input[k]`` · z + ``of_output[k]`` · prediction.

    z is the denoiser's input as it is given to it, scaled by the scheduler, and ``alpha[k]`` and
    ``sigma[k]`` are the shares of x0 and ε in it. ``sampler`` says which scheduler takes the steps
    (:func:`sampler_of`), ``response`` what it makes of predictions, where that is known.
    """

    of_input: tuple[float, ...]
    of_output: tuple[float, ...]
    alpha: tuple[float, ...]
    sigma: tuple[float, ...]
    sampler: Mapping[str, Any] = field(default_factory=dict, hash=False)
    response: Response | None = field(default=None, hash=False, compare=False, repr=False)

    @property
    def log_snr(self) -> tuple[float, ...]:
        """ln(α/σ) of every step, for comparing them."""
        pairs = zip(self.alpha, self.sigma, strict=True)
        return tuple(
            math.log(a / s) if a and s else (math.inf if a else -math.inf) for a, s in pairs
        )

    def of_steps(self, start: int, steps: int) -> CleanImage:
        """The same of ``steps`` steps from ``start`` on: image-to-image begins in the middle of a
        schedule, and one pipeline may leave the end to another."""
        each = (self.of_input, self.of_output, self.alpha, self.sigma)
        of_input, of_output, alpha, sigma = (values[start : start + steps] for values in each)
        response = self.response and self.response.of_steps(start, steps)
        return CleanImage(of_input, of_output, alpha, sigma, self.sampler, response)

    def check_levels(self, response: Response) -> None:
        """Raise SchedulerError for a sampler whose latents have other noise levels than its
        timesteps say: given one clean image and noise all the time, they are no mix of these.
        Some that begin in the middle of their schedule are: PNDM takes its second step for a
        repetition of the first, LMS weighs steps that there were not."""
        paths = []
        for image, noise in ((1.0, 0.0), (0.0, 1.0)):
            inputs = [a * image + s * noise for a, s in zip(self.alpha, self.sigma, strict=True)]
            given = [
                (image - w * z) / v
                for w, v, z in zip(self.of_input, self.of_output, inputs, strict=True)
            ]
            first = inputs[0] / response.scale
            paths.append(
                [
                    start * first + sum(w * p for w, p in zip(row[:k], given, strict=False))
                    for k, (row, start) in enumerate(
                        zip(response.weights[:-1], response.start, strict=False)
                    )
                ]
            )
        for x, y, alpha, sigma in zip(*paths, self.alpha, self.sigma, strict=True):
            if abs(x * sigma - y * alpha) > _OFF * (abs(x) * sigma + abs(y) * alpha):
                raise SchedulerError(
                    f"{self.sampler['class']} has other noise levels than its timesteps say, where "
                    "it begins in the middle of its schedule"
                )

    def x0(self, step: int, z: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        """The clean image; same shape as both, in float32 (float64 if one of them is)."""
        wide = torch.promote_types(torch.promote_types(z.dtype, prediction.dtype), torch.float32)
        return self.of_input[step] * z.to(wide) + self.of_output[step] * prediction.to(wide)

    def noise(self, step: int, z: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        """ε, where z = α · x0 + σ · ε, in the dtype of ``x0``; zero where there is none (σ = 0)."""
        if not self.sigma[step]:
            return torch.zeros_like(x0)
        return (z.to(x0.dtype) - self.alpha[step] * x0) / self.sigma[step]

    def prediction(self, step: int, z: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        """What the denoiser would have predicted at z, in the dtype of ``x0``."""
        return (x0 - self.of_input[step] * z.to(x0.dtype)) / self.of_output[step]


#: What of a scheduler's configuration decides about the noise of its steps only: α and σ tell that.
_OF_LEVELS = {
    "beta_end", "beta_schedule", "beta_start", "num_train_timesteps", "steps_offset",
    "timestep_spacing", "trained_betas",
}  # fmt: skip


def sampler_of(scheduler: Any) -> dict[str, Any]:
    """How a scheduler steps, besides the noise of its steps: the name of its class, and its
    configuration as plain data."""
    config = {str(k): v for k, v in dict(scheduler.config).items()}
    found = {k: v for k, v in config.items() if not k.startswith("_") and k not in _OF_LEVELS}
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str, sort_keys=True))
    return {"class": type(scheduler).__name__, **plain}


def last_steps(scheduler: Any, steps: int, options: Mapping[str, Any] | None = None) -> CleanImage:
    """The weights for the last ``steps`` steps of a scheduler that has not stepped yet, with its
    response, if it has one. ``options``: further arguments of its ``step``. Raises as
    :func:`clean_image` does, and SchedulerError for None."""
    if scheduler is None:
        raise SchedulerError(
            "schedule='wavefront' has to know α and σ of every step: pass the scheduler, "
            "generation(timesteps, scheduler)"
        )
    every = clean_image(scheduler)
    start = len(every.alpha) - steps
    try:
        response = respond(scheduler, start, options)
    except SchedulerError:
        response = None
    return replace(every.of_steps(start, steps), response=response)


def clean_image(scheduler: Any, *, backwards: bool = False) -> CleanImage:
    """The weights for every step of a diffusers scheduler whose timesteps are set, and who steps.

    ``backwards``: the pipeline counts time from the other end (1 − t/n, as Lumina 2 does), so that
    the denoiser predicts x0 − ε where others of its kind predict ε − x0.

    Raises SchedulerError where α and σ cannot be had, or x0 does not follow from the prediction.
    """
    weights = [values.tolist() for values in _weights(scheduler, backwards)]
    for k, weight in enumerate(weights[1]):
        if not _TINY < abs(weight) < 1 / _TINY:
            raise SchedulerError(
                f"{type(scheduler).__name__}: in step {k} the clean image does not follow from the "
                f"prediction (its weight would be {weight:.1e}; zero terminal SNR needs v "
                "prediction): take schedule='asyncdiff', or other settings"
            )
    of_input, of_output, alpha, sigma = map(tuple, weights)
    return CleanImage(of_input, of_output, alpha, sigma, sampler_of(scheduler))


def _weights(scheduler: Any, backwards: bool) -> tuple[torch.Tensor, ...]:
    """Of the input and the prediction in x0, then α and σ, by step."""
    count = len(check_scheduler(scheduler))
    check_order(scheduler)
    name = type(scheduler).__name__
    sigmas = getattr(scheduler, "sigmas", None)
    levels = None  # of noise, one a step
    if isinstance(sigmas, torch.Tensor) and len(sigmas) in (count, count + 1):
        levels = sigmas[:count].double().cpu()
    config = scheduler.config
    kind = str(config.get("prediction_type", "epsilon")).removeprefix("original_")
    if levels is not None and config.get("sigma_data") is not None:
        # Karras et al. 2022, table 1, row EDM: x0 = c_skip · x + c_out · F(c_in · x). The input is
        # c_in · x with c_in = 1 / both, and c_skip = data² / both².
        data = float(config["sigma_data"])
        both = (levels**2 + data**2).sqrt()
        out = levels * data / both
        # of v: as diffusers has it
        return data**2 / both, -out if kind == "v_prediction" else out, 1 / both, levels / both
    straight = any("FlowMatch" in c.__name__ for c in type(scheduler).__mro__)
    if levels is not None and (straight or config.get("use_flow_sigmas")):
        alpha, sigma = 1 - levels, levels
        kind = "flow_prediction" if straight else kind
    elif levels is not None:  # noise of this size on an image of size one, scaled to variance one
        alpha = 1 / (1 + levels**2).sqrt()
        sigma = levels * alpha
    elif isinstance(getattr(scheduler, "alphas_cumprod", None), torch.Tensor):
        kept = scheduler.alphas_cumprod.double().cpu()[scheduler.timesteps.long().cpu()]
        alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
    else:
        raise SchedulerError(
            f"{name} has neither sigmas of its steps nor alphas_cumprod, so the clean image that a "
            "prediction means cannot be had: take schedule='asyncdiff', or another scheduler, such "
            "as DDIM, Euler, DPMSolverMultistep or FlowMatchEuler"
        )
    if kind not in _MIXES:
        raise SchedulerError(
            f"{name} has prediction_type={kind!r}, which is not one of {', '.join(_MIXES)}: take "
            "schedule='asyncdiff'"
        )
    noise, image = _MIXES[kind](alpha, sigma)  # prediction = noise · ε + image · x0
    if backwards and kind == "flow_prediction":
        noise, image = -noise, -image
    share = alpha * noise - sigma * image
    return noise / share, torch.where(share != 0, -sigma / share, math.inf), alpha, sigma


#: How much ε and x0 a prediction holds.
_MIXES: dict[str, Callable[[torch.Tensor, torch.Tensor], tuple[Any, Any]]] = {
    "epsilon": lambda alpha, sigma: (1.0, 0.0),
    "sample": lambda alpha, sigma: (0.0, 1.0),
    "v_prediction": lambda alpha, sigma: (alpha, -sigma),
    "flow_prediction": lambda alpha, sigma: (1.0, -1.0),
}
