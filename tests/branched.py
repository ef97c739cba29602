"""A loop of steps that call the denoiser once for each of two conditions."""

from __future__ import annotations

import contextlib
from typing import Any

import diffusers
import torch

from asyncdiff import AsyncDenoiser

STEPS, SCALE = 9, 3.0


def scheduler() -> Any:
    made = diffusers.DDIMScheduler(clip_sample=False)
    made.set_timesteps(STEPS)
    return made


def guided(noise: list[torch.Tensor]) -> torch.Tensor:
    return noise[0] + SCALE * (noise[1] - noise[0])


def by_batch(denoiser: AsyncDenoiser, call: dict[str, Any]) -> torch.Tensor:
    """Latents after all steps of ``call``, of two conditions, in one call a step."""
    sampler, latents = scheduler(), call["sample"][:1]
    with denoiser.generation(sampler.timesteps, sampler):
        for t in sampler.timesteps:
            both = denoiser(
                torch.cat([latents] * 2), t.to(latents.device), call["encoder_hidden_states"]
            )[0]
            latents = sampler.step(guided(both.chunk(2)), t, latents).prev_sample
    return latents


def by_branch(
    denoiser: AsyncDenoiser, latents: torch.Tensor, texts: list[torch.Tensor], said: bool
) -> torch.Tensor:
    """The same in a call for each condition. ``said``: the second one is called first, and each by
    its number."""
    sampler = scheduler()
    order = [1, 0] if said else [0, 1]
    with denoiser.generation(sampler.timesteps, sampler, branches=2):
        for t in sampler.timesteps:
            noise: dict[int, torch.Tensor] = {}
            for b in order:
                with denoiser.branch(b) if said else contextlib.nullcontext():
                    (noise[b],) = denoiser(latents, t.to(latents.device), texts[b])
            latents = sampler.step(guided([noise[0], noise[1]]), t, latents).prev_sample
    return latents
