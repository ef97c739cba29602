"""A worker as inference servers have them (vLLM-Omni, SGLang diffusion): a process for each GPU,
and a queue of requests that all processes are told of by the first one.

torchrun --nproc-per-node 2 examples/stacks/worker_loop.py

The denoiser is a tiny one with random weights. What a server does with it is here: prepare shapes
ahead, draw, abort between two steps, draw with other numbers of steps, sleep and wake.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist

import asyncdiff

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
import tiny  # a stand-in for a model, in examples/python


@dataclass
class Request:
    """What to draw. ``abort_at``: the step before which the client goes away."""

    seed: int
    steps: int = 20
    size: int = 8
    abort_at: int | None = None


class Worker:
    """The denoiser of one process."""

    def __init__(self, group: dist.ProcessGroup, device: str) -> None:
        self.group, self.device = group, device
        self.module = tiny.unet().to(device)
        self.scheduler = diffusers.DDIMScheduler(clip_sample=False)
        self.denoiser: asyncdiff.AsyncDenoiser | None = None
        self.wake()

    def wake(self) -> None:
        """Spread the denoiser over the processes."""
        ranks = dist.get_world_size(self.group)
        self.denoiser = asyncdiff.AsyncDenoiser(
            self.module, group=self.group, components=ranks, warmup=3, split="estimate"
        )

    def sleep(self) -> None:
        """Give the ranks' memory back."""
        assert self.denoiser is not None
        self.denoiser.close()
        self.denoiser = None

    def prepare(self, sizes: list[int], steps: int) -> None:
        """Make everything ready for pictures of these sizes, in so many steps."""
        assert self.denoiser is not None
        for size in sizes:
            latents = torch.zeros(2, 4, size, size, device=self.device)
            time = torch.tensor(0, device=self.device)
            text = torch.zeros(2, 7, tiny.TEXT, device=self.device)
            self.denoiser.prepare(latents, time, encoder_hidden_states=text, steps=steps)

    def draw(self, request: Request) -> torch.Tensor | None:
        """The latents of a picture; None where its client went away."""
        assert self.denoiser is not None
        noise = torch.Generator("cpu").manual_seed(request.seed)
        latents = torch.randn(1, 4, request.size, request.size, generator=noise).to(self.device)
        text = torch.randn(2, 7, tiny.TEXT, generator=noise).to(self.device)
        # Another number of steps needs nothing: a plan is made for each generation.
        self.scheduler.set_timesteps(request.steps, device=self.device)
        with self.denoiser.generation(self.scheduler.timesteps):
            for step, t in enumerate(self.scheduler.timesteps):
                # Asked before every step, so that all processes stop at the same one.
                if from_first(step == request.abort_at, self.group):
                    return None
                batch = torch.cat([latents, latents])
                noise_pred = self.denoiser(batch, t, encoder_hidden_states=text).sample
                without, with_text = noise_pred.chunk(2)
                guided = without + 5.0 * (with_text - without)
                latents = self.scheduler.step(guided, t, latents).prev_sample
        return latents


def queue() -> Iterator[tuple[str, Any]]:
    """What the first process has to do; in a server, requests of clients."""
    yield "prepare", ([8, 16], 20)
    yield "draw", Request(seed=1)
    yield "draw", Request(seed=2, size=16)
    yield "draw", Request(seed=3, abort_at=7)
    yield "draw", Request(seed=1)
    yield "draw", Request(seed=4, steps=9)
    yield "sleep", None
    yield "wake", None
    yield "draw", Request(seed=1)
    yield "end", None


def from_first(value: Any, group: dist.ProcessGroup) -> Any:
    """What the first process says, in all."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def main() -> None:
    gpu = torch.cuda.is_available()
    device = f"cuda:{os.environ['LOCAL_RANK']}" if gpu else "cpu"
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    worker, work, drawn = Worker(group, device), queue(), []
    while True:
        what, order = from_first(next(work) if rank == 0 else None, group)
        if what == "end":
            break
        if what == "prepare":
            worker.prepare(*order)
        elif what == "draw":
            out = worker.draw(order)
            drawn.append("aborted" if out is None else f"{out.double().mean():.12f}")
        else:
            getattr(worker, what)()
    worker.sleep()
    if rank == 0:
        print("\n".join(drawn))
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, drawn)
    if rank == 0:
        same = all(one == drawn for one in everybody) and drawn[0] == drawn[3] == drawn[5]
        print(f"{len(drawn)} requests, all processes drew the same: {same}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
