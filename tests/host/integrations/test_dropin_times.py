"""Which timesteps a pipeline will ask for, told by its first call, and corrected by a later one."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import reference
import torch
from tiny_pipelines import draw, tiny_sd, tiny_unet

import asyncdiff
from asyncdiff.integrations.diffusers.timesteps import TimestepTracker

N = 1000.0


def at(scheduler: Any, first: torch.Tensor, *args: Any) -> tuple[str, int]:
    times = TimestepTracker(scheduler, first, *args)
    return times.reading.mapping, times.start


def test_where_a_generation_begins() -> None:
    """What lies in the scheduler's memory says where by its place; else the nearer to the start,
    then the simpler mapping."""
    ddim = diffusers.DDIMScheduler()
    ddim.set_timesteps(10)  # 900 … 0: its own mirror image
    pndm = diffusers.PNDMScheduler(skip_prk_steps=True)
    pndm.set_timesteps(10)
    assert pndm.timesteps[1] == pndm.timesteps[2]
    for scheduler in (ddim, pndm):
        for k, t in enumerate(scheduler.timesteps):
            assert at(scheduler, t) == ("t", k)
            assert len(TimestepTracker(scheduler, t).values) == len(scheduler.timesteps) - k
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    flow.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8))
    for k, t in enumerate(flow.timesteps):
        assert at(flow, (t / N).expand(1)) == ("t / n", k)
    assert len(TimestepTracker(flow, flow.timesteps[2], 3).values) == 3


def test_how_many_steps_there_are_tells_where_they_begin() -> None:
    """In a schedule that is its own mirror image, and one that names a timestep twice."""
    ddim = diffusers.DDIMScheduler()
    ddim.set_timesteps(10)
    for k in range(10):
        t = ddim.timesteps[k]
        assert at(ddim, t.clone(), 10 - k) == ("t", k)
        if k not in (4, 5, 8):  # in the middle, or at both ends: the next call tells
            assert at(ddim, N - t.float(), 10 - k) == ("n - t", k)
            assert at(ddim, 1 - t.float() / N, 10 - k) == ("1 - t / n", k)
    pndm = diffusers.PNDMScheduler(skip_prk_steps=True)
    pndm.set_timesteps(10)
    for k in (1, 2):
        assert at(pndm, pndm.timesteps[k].clone(), len(pndm.timesteps) - k) == ("t", k)


def test_timesteps_that_are_a_view_with_a_step() -> None:
    class Every(diffusers.DDIMScheduler):
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            self.timesteps = self.timesteps.repeat_interleave(3)[1::3]

    pipe, call = tiny_sd()
    pipe.scheduler = Every.from_config(pipe.scheduler.config)
    want = draw(pipe, call)
    assert pipe.scheduler.timesteps.stride() == (3,)
    for k, t in enumerate(pipe.scheduler.timesteps):
        assert at(pipe.scheduler, t) == at(pipe.scheduler, t.expand(2)) == ("t", k)
    # In the same memory, but none of them.
    other = pipe.scheduler.timesteps.as_strided((), (), 0)
    assert at(pipe.scheduler, other) == ("t", 0)
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, warmup=4, split="estimate") as handle:
        assert reference.distance(draw(pipe, call), want) < 1e-5
        assert handle.report().steps == 4


class Loop:
    """A pipeline that passes its denoiser what ``made`` makes of timesteps, from the ``start``-th
    on."""

    def __init__(self, times: torch.Tensor, made: Any, start: int = 0) -> None:
        self.unet = tiny_unet()
        self.scheduler = diffusers.DDIMScheduler()
        self.scheduler.set_timesteps(len(times))
        self.scheduler.timesteps = times
        self.made, self.start = made, start

    def __call__(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(1, 4, 8, 8, generator=generator)
        text = torch.randn(1, 8, 32, generator=generator)
        self.num_timesteps = len(self.scheduler.timesteps) - self.start
        self.scheduler.timesteps = self.scheduler.timesteps.clone()
        for t in self.scheduler.timesteps[self.start :]:
            latents = latents - 0.1 * self.unet(latents, self.made(t), text).sample
        return latents


@pytest.mark.parametrize(
    ("times", "made", "start"),
    [
        (torch.arange(0.0, N, 200), lambda t: t / N, 0),
        (torch.arange(900.0, 0, -100), lambda t: N - t, 4),
        (torch.arange(900.0, 0, -100), lambda t: 1 - t / N, 0),
        (torch.arange(900.0, 0, -100), lambda t: 1 - t / N, 4),
    ],
    ids=["begins at 0", "begins in the middle", "mirrors itself", "mirrors itself, in the middle"],
)
@pytest.mark.parametrize("warmup", [9, 1])
def test_what_the_first_call_does_not_tell(
    times: torch.Tensor, made: Any, start: int, warmup: int
) -> None:
    """The second one does; the next generation knows it from the beginning."""
    pipe = Loop(times, made, start)
    want = pipe()
    settings: dict[str, Any] = {"warmup": warmup, "stride": 2, "split": "estimate"}
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 3, **settings) as handle:
        for _ in range(2):
            assert reference.distance(pipe(), want) < (1e-5 if warmup == 9 else 0.5)
        assert handle.report().steps == pipe.num_timesteps
