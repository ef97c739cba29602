"""A video by AnimateDiff on two devices.

python examples/python/video.py
"""

from __future__ import annotations

import diffusers
import torch
from tiny import parts, text

import asyncdiff

FRAMES = 4

torch.manual_seed(3)
adapter = diffusers.MotionAdapter(
    block_out_channels=(32, 64),
    motion_layers_per_block=1,
    motion_num_attention_heads=2,
    motion_norm_num_groups=8,
    use_motion_mid_block=False,
)
pipe = diffusers.AnimateDiffPipeline(**parts(), motion_adapter=adapter)
handle = asyncdiff.parallelize(pipe, ["cpu"] * 2)

frames = pipe(
    **text(),
    num_frames=FRAMES,
    height=16,
    width=16,
    num_inference_steps=12,
    generator=torch.Generator().manual_seed(0),
    output_type="np",
).frames[0]

print(handle.settings)
print(handle.report())
print(f"{len(frames)} frames of {frames.shape[2]} x {frames.shape[1]} pixels")
handle.restore()
