"""A ControlNet in front of a parallelised denoiser.

The ControlNet runs on the pipeline's own device, as before. Its residuals are new in every step and
go to whichever part of the denoiser needs them.

python examples/python/controlnet.py
"""

from __future__ import annotations

import diffusers
import torch
from tiny import controlnet, parts, text, unchecked

import asyncdiff

pipe = diffusers.StableDiffusionControlNetPipeline(
    **parts(), **unchecked(), controlnet=controlnet()
)
edges = torch.zeros(1, 3, 16, 16)
edges[:, :, 4:12, 4:12] = 1.0


def draw(strength: float) -> torch.Tensor:
    """The latents of one picture, from the same noise."""
    return pipe(
        **text(),
        image=edges,
        controlnet_conditioning_scale=strength,
        num_inference_steps=12,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images


handle = asyncdiff.parallelize(pipe, ["cpu"] * 2)
steered, free = draw(1.0), draw(0.0)
print(handle.settings)
print(handle.report())
print(f"the ControlNet changes the latents by {(steered - free).norm() / free.norm():.0%}")
handle.restore()
