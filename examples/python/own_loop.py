"""A denoiser without a pipeline: your own loop, your own sampler.

python examples/python/own_loop.py
"""

from __future__ import annotations

import diffusers
import torch
from tiny import TEXT, unet

import asyncdiff

GUIDANCE = 5.0

scheduler = diffusers.DDIMScheduler(clip_sample=False)
scheduler.set_timesteps(10)
noise = torch.Generator().manual_seed(0)
latents = torch.randn(1, 4, 8, 8, generator=noise)
text = torch.randn(2, 7, TEXT, generator=noise)  # [unconditional, conditional]

denoiser = asyncdiff.AsyncDenoiser(unet(), devices=["cpu"] * 2, components=2, warmup=2)

# The engine is told all timesteps before: neighbouring steps run at the same time.
with denoiser.generation(scheduler.timesteps):
    for t in scheduler.timesteps:
        batch = torch.cat([latents, latents])
        predicted = denoiser(batch, t, encoder_hidden_states=text).sample
        without, with_text = predicted.chunk(2)
        guided = without + GUIDANCE * (with_text - without)
        latents = scheduler.step(guided, t, latents).prev_sample

print(denoiser.report())
print(f"latents of shape {tuple(latents.shape)}, standard deviation {latents.std():.2f}")
denoiser.close()
