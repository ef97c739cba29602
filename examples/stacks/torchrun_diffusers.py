"""A diffusers pipeline in processes that torchrun starts, a rank each.

torchrun --nproc-per-node 2 examples/stacks/torchrun_diffusers.py [MODEL]

MODEL is a folder of diffusers, or an id of the hub; without one, a tiny pipeline with random
weights. On GPUs each process takes that of its LOCAL_RANK.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import diffusers
import torch
import torch.distributed as dist

import asyncdiff

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
import tiny  # a stand-in for a model, in examples/python

gpu = torch.cuda.is_available()
device = f"cuda:{os.environ['LOCAL_RANK']}" if gpu else "cpu"
if gpu:
    torch.cuda.set_device(device)
dist.init_process_group("gloo")  # a stack has a group already, of whatever backend
rank = dist.get_rank()

if len(sys.argv) > 1:
    dtype = torch.float16 if gpu else torch.float32
    pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=dtype)
    call = {"prompt": "a lighthouse in a storm, oil on canvas"}
else:
    pipe = diffusers.StableDiffusionPipeline(**tiny.parts(), **tiny.unchecked())
    call = {**tiny.text(), "height": 16, "width": 16}
pipe.to(device)
pipe.set_progress_bar_config(disable=rank > 0)

with asyncdiff.parallelize(pipe, group=dist.group.WORLD) as handle:
    # All processes ask for the same; the noise is drawn on the CPU, so that it is the same.
    for seed in range(2):
        noise = torch.Generator("cpu").manual_seed(seed)
        image = pipe(num_inference_steps=20, generator=noise, **call).images[0]
    if rank == 0:
        print(handle.report())
        image.save("torchrun_diffusers.png")
        ranks = dist.get_world_size()
        print(f"a picture of {image.width} x {image.height} pixels by {ranks} ranks")

dist.destroy_process_group()
