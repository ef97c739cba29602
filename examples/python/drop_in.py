"""A diffusers pipeline on two devices: one call, and the pipeline is used as before.

python examples/python/drop_in.py
"""

from __future__ import annotations

import torch

import asyncdiff
from asyncdiff import demo

pipe = demo.load()  # the shipped model of emoji; any diffusers pipeline is used like it
noise = torch.Generator().manual_seed(0)
plain = pipe("red apple", num_inference_steps=30, generator=noise).images[0]

handle = asyncdiff.parallelize(pipe, ["cpu"] * 2)  # quality="balanced"; None: all GPUs
noise = torch.Generator().manual_seed(0)
parallel = pipe("red apple", num_inference_steps=30, generator=noise).images[0]

print(handle.settings)  # what was chosen for two devices and these 30 steps, and why
print(handle.partition.report())  # which part of the denoiser went where, and what crosses
print(handle.report())  # steps, ticks, milliseconds, bytes
handle.restore()  # the pipeline as it was

plain.save("plain.png")
parallel.save("parallel.png")
print("plain.png was drawn on one device, parallel.png on two, from the same noise")
