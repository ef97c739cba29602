"""Image to image: the pipeline begins in the middle of the schedule, which is noticed by itself.

python examples/python/image_to_image.py
"""

from __future__ import annotations

import diffusers
import torch
from tiny import parts, text, unchecked

import asyncdiff

pipe = diffusers.StableDiffusionImg2ImgPipeline(**parts(), **unchecked())
start = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))

# A context: at its end the pipeline is what it was.
with asyncdiff.parallelize(pipe, ["cpu"] * 2) as handle:
    picture = pipe(
        **text(),
        image=start,
        strength=0.6,  # 12 of the 20 steps
        num_inference_steps=20,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]

    print(handle.settings)
print(handle.report())
print(f"a picture of {picture.shape[1]} x {picture.shape[0]} pixels")
