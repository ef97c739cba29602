"""From noise to the final latents in one call, without a pipeline.

python examples/python/whole_generation.py
"""

from __future__ import annotations

import diffusers
import torch
from tiny import TEXT, unet

import asyncdiff

scheduler = diffusers.DPMSolverMultistepScheduler()
noise = torch.Generator().manual_seed(0)
latents = torch.randn(1, 4, 8, 8, generator=noise) * scheduler.init_noise_sigma
text = torch.randn(2, 7, TEXT, generator=noise)  # twice the batch: [unconditional, conditional]

denoiser = asyncdiff.AsyncDenoiser(unet(), devices=["cpu"] * 2, components=2)
latents = denoiser.generate(
    latents,
    {"encoder_hidden_states": text},
    scheduler,
    num_inference_steps=12,
    guidance_scale=5.0,
)

print(denoiser.report())
print(f"latents of shape {tuple(latents.shape)}, standard deviation {latents.std():.2f}")
denoiser.close()
