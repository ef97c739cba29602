"""Pipelines that call a small denoiser several times a step."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from toys import Toy

STEPS = 8
#: Which texts are called with in a step, in order.
Order = Callable[[int], Any]


def both(k: int) -> list[int]:
    return [0, 1]


def small(seed: int = 0) -> Toy:
    torch.manual_seed(seed)
    return Toy().eval().requires_grad_(False)


class Both:
    """Guidance in two calls a step, with texts of two lengths, by two denoisers in turn, each of
    which has a part of the steps."""

    def __init__(self) -> None:
        self.unet: Any = small()
        self.unet_2: Any = small(1)
        self.scheduler = diffusers.DDIMScheduler(clip_sample=False)
        self.config = SimpleNamespace(boundary_ratio=0.4)
        generator = torch.Generator().manual_seed(3)
        self.texts = [torch.randn(1, n, 6, generator=generator) for n in (8, 5)]

    @torch.no_grad()
    def __call__(self, order: Order = both, change: Any = None) -> torch.Tensor:
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        self.scheduler.set_timesteps(10)
        for k, t in enumerate(self.scheduler.timesteps):
            denoiser = self.unet if t >= 400 else self.unet_2
            noise = {i: denoiser(latents, t, self.texts[i])[0] for i in order(k)}
            total = noise[0] + 2.0 * (noise.get(1, noise[0]) - noise[0])
            latents = self.scheduler.step(total, t, latents).prev_sample
            if change is not None:
                change(k)
        return latents
