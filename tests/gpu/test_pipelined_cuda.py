"""The pipeline schedule on GPUs: exact, and no step of a picture waits for the others."""

from __future__ import annotations

import time
from typing import Any

import diffusers
import pytest
import reference
import torch
from conftest import PLACES, devices_for
from tiny_pipelines import draw, tiny_sd, tiny_sd3
from toys import toy

import asyncdiff
from asyncdiff import AsyncDenoiser
from asyncdiff.microbatches import MicroBatched

pytestmark = pytest.mark.usefixtures("full_float32")

TIMES = torch.tensor([900 - 100 * k for k in range(8)])
SPLITS = {
    2: [["enter", "down"], ["mix", "up", "leave"]],
    3: [["enter", "down.0"], ["down.1", "down.2", "mix"], ["up", "leave"]],
}


def inputs(pictures: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(5)
    latents = torch.randn(pictures, 4, 8, 8, generator=random)
    text = torch.randn(2 * pictures, 3, 6, generator=random)
    return latents.to(device), text.to(device)


def generation(denoise: Any, latents: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    before = torch.zeros_like(latents)
    for t in TIMES.to(latents.device):
        noise = denoise(torch.cat([latents, latents]), t, encoder_hidden_states=text)[0]
        without, given = noise.chunk(2)
        noise = without + 3.0 * (given - without)
        latents, before = latents - 0.1 * noise - 0.02 * before, noise
    return latents


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("components", "pictures"), [(2, 2), (2, 4), (2, 3), (3, 3)])
def test_equals_one_picture_after_another(place: str, components: int, pictures: int) -> None:
    names = [f"cuda:{d}" for d in devices_for(place, components)]
    module = toy().to(names[0], torch.float32)
    denoiser = AsyncDenoiser(
        toy().to(names[0], torch.float32),
        devices=names,
        components=components,
        split=SPLITS[components],
        schedule="pipeline",
    )
    latents, text = inputs(pictures, names[0])
    want = torch.cat(
        [generation(module, latents[i : i + 1], text[[i, pictures + i]]) for i in range(pictures)]
    )
    results = []
    for _ in range(3):
        with denoiser.generation(TIMES):
            got = generation(denoiser, latents, text)
        assert isinstance(got, MicroBatched)
        assert got.parts is not None
        results.append(got.cpu())
        assert reference.distance(results[-1], want.cpu()) < 1e-5
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert denoiser.report().cuda_graphs
    denoiser.close()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("make", [tiny_sd, tiny_sd3])
def test_pipelines_equal_the_plain_ones(place: str, make: Any) -> None:
    names = [f"cuda:{d}" for d in devices_for(place, 2)]
    results = []
    for parallel in (False, True):
        torch.manual_seed(0)
        pipe, call = make()
        pipe.set_progress_bar_config(disable=True)
        if make is tiny_sd:
            pipe.scheduler = diffusers.DPMSolverMultistepScheduler()
        pipe.to(names[0])
        call = {
            k: torch.cat([v, v.flip(1), 2 * v, -v]).to(names[0])
            if isinstance(v, torch.Tensor)
            else v
            for k, v in call.items()
        } | {"num_inference_steps": 6}
        if parallel:
            asyncdiff.parallelize(pipe, devices=names, schedule="pipeline", split="estimate")
            draw(pipe, call)
        results.append(draw(pipe, call).cpu())
    assert reference.distance(results[1], results[0]) < 1e-4


class Half(torch.nn.Module):
    """Busy for some milliseconds, whatever its batch is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, sample: Any) -> torch.Tensor:
        # It depends on the sample, so that it is this half's, and no step finds it computed.
        busy = sample[0, 0, 0, :1].expand(3072, 3072).clone()
        for _ in range(16):
            busy = busy @ busy * 1e-4
        return self.layer(sample) + busy[0, :4] * 0


class Slow(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Half(), Half()

    def forward(self, sample: Any, timestep: Any) -> tuple[torch.Tensor]:
        return (self.second(self.first(sample)),)


@pytest.mark.alone
def test_two_gpus_work_on_two_pictures_at_once() -> None:
    names = [f"cuda:{d}" for d in devices_for("several GPUs", 2)]
    times = {}
    for microbatches, pictures in ((1, 1), (2, 2), (4, 4)):
        denoiser = AsyncDenoiser(
            Slow().to(names[0]).eval(),
            devices=names,
            split=[["first"], ["second"]],
            schedule="pipeline",
        )
        x = torch.randn(pictures, 4, 8, 4, device=names[0])
        for _ in range(3):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            latents = x
            with denoiser.generation(TIMES):
                for t in TIMES:
                    latents = latents - 0.1 * denoiser(latents, t)[0]
            torch.cuda.synchronize()
            times[microbatches] = time.perf_counter() - begun
        denoiser.close()
    # Two pictures take as long as one does, and half a step to fill the pipeline.
    assert times[2] < 1.35 * times[1]
