"""What waves have to know of a run: how clean images follow from predictions, and of samplers that
are sums of what they are given, what they make of each, to pay back what late ones misled them by.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from asyncdiff.errors import SchedulerError
from asyncdiff.sampling.clean_image import CleanImage
from asyncdiff.sampling.response import Response, response_of

from .samplers import name_of

#: A sampler that is not linear, or draws noise, is further off.
_CLOSE = 1e-6
#: Below this share of the prediction in x0, or above its inverse, the two cannot be told apart.
_TINY = 1e-8


def clean_images(model_sampling: Any, sigmas: torch.Tensor, sampler: Any) -> CleanImage:
    """How clean images follow from predictions at ``sigmas`` but the last, which waves have to
    know, and what the sampler makes of predictions, if it is linear. The first is read off what
    ``model_sampling`` makes of images of zeros and ones.

    Raises SchedulerError where they do not follow.
    """
    one, zero = torch.ones(1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double()
    rows = []
    for value in sigmas[:-1].tolist():
        sigma = torch.tensor([value], dtype=torch.float64)
        scale = model_sampling.calculate_input(sigma, one.clone())
        of_input = model_sampling.calculate_denoised(sigma, zero.clone(), one.clone()) / scale
        of_output = model_sampling.calculate_denoised(sigma, one.clone(), zero.clone())
        image = scale * model_sampling.noise_scaling(sigma, zero.clone(), one.clone())
        noise = scale * model_sampling.noise_scaling(sigma, one.clone(), zero.clone())
        row = [float(x) for x in (of_input, of_output, image, noise)]
        if not _TINY < abs(row[1]) < 1 / _TINY:
            raise SchedulerError(
                f"AsyncDiff parallel: at sigma {value:g} the clean image does not follow from the "
                "prediction: choose schedule asyncdiff"
            )
        rows.append(row)
    columns = (tuple(column) for column in zip(*rows, strict=True))
    clean = CleanImage(*columns, {"class": name_of(sampler)})
    response = response_to(model_sampling, sigmas, sampler)
    if response is not None:
        try:
            clean.check_levels(response)
        except SchedulerError:
            response = None
    return replace(clean, response=response)


def served(model_sampling: Any, sigmas: torch.Tensor, sampler: Any) -> CleanImage | str:
    """The same of steps that waves serve well, or why they do not."""
    try:
        clean = clean_images(model_sampling, sigmas, sampler)
    except SchedulerError:
        return "waves do not know this sampler's noise levels"
    if clean.response is None:
        return f"{name_of(sampler)} is not linear, or draws noise in its steps"
    return clean


def response_to(model_sampling: Any, sigmas: torch.Tensor, sampler: Any) -> Response | None:
    """What a sampler makes of the predictions at ``sigmas`` (the last of them not evaluated); None
    for one that is not linear, or cannot be run without a model."""
    levels = sigmas.detach().double().cpu()
    steps = len(levels) - 1
    axes = torch.eye(steps + 1, dtype=torch.float64)
    given = torch.randn(steps + 1, generator=torch.Generator().manual_seed(0)).double()
    try:
        with torch.random.fork_rng(devices=[]):
            rows = _run(model_sampling, levels, sampler, axes, 0)
            known = _run(model_sampling, levels, sampler, given[:, None], 1)[:, 0]
        if (rows @ given - known).abs().max() > _CLOSE * known.abs().max():
            return None
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        scale = float(model_sampling.calculate_input(levels[:1], one))
        return response_of(rows, scale, name_of(sampler))
    except SchedulerError:
        return None
    except Exception:  # samplers of others may ask a model for anything
        return None


def _run(
    model_sampling: Any, sigmas: torch.Tensor, sampler: Any, given: torch.Tensor, seed: int
) -> torch.Tensor:
    """The latents before each step and after the last one, where row 0 of ``given`` are the first
    ones, and row k + 1 what is predicted in step k. A row is a picture of so many pixels."""
    pixels = given.unsqueeze(1).unsqueeze(1).unsqueeze(1)
    seen: list[torch.Tensor] = []

    def denoised(x: torch.Tensor, sigma: torch.Tensor, **_: Any) -> torch.Tensor:
        seen.append(x.clone())
        return model_sampling.calculate_denoised(sigma, pixels[len(seen)], x)

    inner = SimpleNamespace(model_sampling=model_sampling)
    model = _Model(denoised, SimpleNamespace(inner_model=inner))
    torch.manual_seed(seed)
    options = {"extra_args": {"model_options": {}, "seed": seed}, "callback": None, "disable": True}
    last = sampler.sampler_function(
        model, pixels[0].clone(), sigmas, **options, **sampler.extra_options
    )
    if len(seen) != len(sigmas) - 1:
        raise SchedulerError("the sampler does not evaluate once a step")
    return torch.stack([*seen, last])[:, 0, 0, 0]


class _Model:
    """What a sampler takes for the denoiser."""

    def __init__(self, call: Any, inner_model: Any) -> None:
        self._call, self.inner_model = call, inner_model

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._call(*args, **kwargs)
