"""Waves around an optimal denoiser, by whole evaluations: for any sampler, in milliseconds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from asyncdiff.sampling.clean_image import last_steps
from asyncdiff.sampling.predictor import Line, Predictor, default_order

SIZE, CENTRES, WIDTH = 32, 24, 0.25
_CENTRES = 0.8 * torch.randn(
    CENTRES, SIZE, generator=torch.Generator().manual_seed(5), dtype=torch.float64
)


def posterior(z: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """The mean clean image of z = α·x0 + σ·ε, where pictures are a mixture of Gaussians."""
    variance = (alpha * WIDTH) ** 2 + sigma**2
    away = z.flatten(1)[:, None] - alpha * _CENTRES
    shares = (-away.square().sum(-1) / (2 * variance)).softmax(1)
    means = _CENTRES + away * (alpha * WIDTH**2 / variance)
    return (shares[..., None] * means).sum(1).view_as(z)


def draw(
    scheduler: Any,
    *,
    delay: int = 0,
    warmup: int = 1,
    tail: int = 0,
    pay: bool = True,
    image: Callable[[torch.Tensor, float, float], torch.Tensor] = posterior,
    options: dict[str, Any] | None = None,
) -> torch.Tensor:
    """The final latents of 8 pictures, by a scheduler whose timesteps are set. Predictions arrive
    ``delay`` steps late, those under way with the first of the exact steps at the end; 0: all are
    exact. ``pay``: whether errors are paid back."""
    scheduler, options = copy.deepcopy(scheduler), options or {}
    steps = len(scheduler.timesteps)
    clean = last_steps(scheduler, steps, options)
    rule = Line(default_order(clean, delay, 1))
    late = Predictor(clean if pay else replace(clean, response=None), rule, delay)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, SIZE, 1, 1, generator=generator, dtype=torch.float64)
    x = x * float(getattr(scheduler, "init_noise_sigma", 1.0))
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    inputs, exact = [], []
    for k, t in enumerate(scheduler.timesteps):
        z = scale(x, t).double()
        inputs.append(z)
        exact.append(clean.prediction(k, z, image(z, clean.alpha[k], clean.sigma[k])))
        first = k == steps - tail
        if delay:
            for j in range(max(warmup, k - delay), k if first else k - delay + 1):
                late.arrived(j, inputs[j], exact[j])
        if not delay:
            given = exact[k]
        elif k < warmup or k >= steps - tail:
            late.arrived(k, z, exact[k])
            given = late.exact(k, z, exact[k])
        else:
            given = late.predict(k, z, z.dtype)
        x = scheduler.step(given, t, x, **options, return_dict=False)[0].double()
    return x


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """Of two results, relative; infinite where one of them is not finite."""
    error = float((got - want).norm() / want.norm())
    return error if error == error else float("inf")
