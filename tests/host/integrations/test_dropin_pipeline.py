"""Pipelines of diffusers with schedule "pipeline": batches, exactly."""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import pytest
import reference
import torch
from rotation import often
from tiny_pipelines import draw, tiny_flux, tiny_sd, tiny_sd3

import asyncdiff
from asyncdiff.microbatches import MicroBatched


def sd(pictures: int) -> Any:
    """A pipeline in float64, in which guidance does not enlarge rounding, and a call for pictures
    with prompts and noise of their own."""
    pipe, call = tiny_sd()
    pipe.unet.double()
    random = torch.Generator().manual_seed(7)
    double = {"generator": random, "dtype": torch.float64}
    call |= {f"{n}prompt_embeds": torch.randn(pictures, 8, 32, **double) for n in ("", "negative_")}
    call["latents"] = torch.randn(pictures, 4, 8, 8, **double)
    return pipe, call


def one_after_another(pipe: Any, call: dict[str, Any], **options: Any) -> torch.Tensor:
    drawn = []
    for i in range(len(call["latents"])):
        mine = {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in call.items()}
        drawn.append(draw(pipe, mine, **options))
    return torch.cat(drawn)


@pytest.fixture(scope="module")
def spread() -> Any:
    pipe, call = sd(2)
    handle = asyncdiff.parallelize(pipe, devices=["cpu"] * 2, schedule="pipeline", split="estimate")
    yield pipe, handle, call
    handle.restore()


SAMPLERS = [
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
]


#: Tried every time, with a guidance: two kinds of calls are prepared for all of them.
OFTEN = [
    *((1.0, f"{name}Scheduler") for name in ("DDIM", "DPMSolverMultistep", "UniPCMultistep")),
    *((7.5, f"{name}Scheduler") for name in ("EulerDiscrete", "LMSDiscrete")),
]


@pytest.mark.parametrize(
    ("guidance", "name"), often(OFTEN, itertools.product((1.0, 7.5), SAMPLERS))
)
def test_equals_one_picture_after_another(spread: Any, name: str, guidance: float) -> None:
    pipe, handle, call = spread
    plain = sd(2)[0]
    for p in (pipe, plain):
        p.scheduler = getattr(diffusers, name).from_config(plain.scheduler.config)
    options = {"guidance_scale": guidance, "num_inference_steps": 6}
    joined = []
    seen = MicroBatched.joined

    def counted(self: MicroBatched) -> torch.Tensor:
        joined.append(self)
        return seen(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MicroBatched, "joined", counted)
        got = draw(pipe, call, **options)
    assert not isinstance(got, MicroBatched)
    assert len(joined) == 1, "a step waited for the whole batch"
    assert reference.distance(got, one_after_another(plain, call, **options)) < 1e-6
    assert handle.report().ticks == 12


def test_random_samplers_have_the_batchs_noise(spread: Any) -> None:
    pipe, _, call = spread
    plain = sd(2)[0]
    for p in (pipe, plain):
        p.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(plain.scheduler.config)
    assert reference.distance(draw(pipe, call), draw(plain, call)) < 1e-5


def test_a_callback_sees_and_changes_ordinary_latents(spread: Any) -> None:
    pipe, _, call = spread
    plain = sd(2)[0]
    for p in (pipe, plain):
        p.scheduler = diffusers.DDIMScheduler(clip_sample=False)

    def change(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        latents = given["latents"]
        if step == 1:
            assert latents.numpy().shape == (2, 4, 8, 8)
            latents[0] *= 0.5
        return {"latents": latents + 0.01 * latents.mean()}

    options = {"callback_on_step_end": change}
    assert reference.distance(draw(pipe, call, **options), draw(plain, call, **options)) < 1e-5


@pytest.mark.slow
def test_guidance_that_is_rescaled_and_other_batches(spread: Any) -> None:
    pipe, handle, _ = spread
    for pictures in (2, 3, 1, 6):
        plain, call = sd(pictures)
        for p in (pipe, plain):
            p.scheduler = diffusers.DDIMScheduler(clip_sample=False)
        options = {"guidance_rescale": 0.7}
        got = draw(pipe, call, **options)
        assert reference.distance(got, one_after_another(plain, call, **options)) < 1e-6
        assert handle.report().ticks == 4 * {1: 1, 2: 2, 3: 3, 6: 2}[pictures]


@pytest.mark.parametrize("make", [tiny_sd3, tiny_flux])
def test_transformers(make: Any) -> None:
    results = []
    for parallel in (False, True):
        torch.manual_seed(0)
        pipe, call = make()
        pipe.set_progress_bar_config(disable=True)
        call = {
            k: torch.cat([v, v.flip(1), 2 * v, -v]) if isinstance(v, torch.Tensor) else v
            for k, v in call.items()
        }
        call["num_inference_steps"] = 4
        if parallel:
            asyncdiff.parallelize(pipe, devices=["cpu"] * 2, schedule="pipeline", split="estimate")
        results.append(draw(pipe, call))
    assert reference.distance(results[1], results[0]) < 1e-5


def test_inference_mode_and_latents_with_channels_last(spread: Any) -> None:
    pipe, _, call = spread
    plain = sd(2)[0]
    for p in (pipe, plain):
        p.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    want = draw(plain, call)
    with torch.inference_mode():
        assert reference.distance(draw(pipe, call), want) < 1e-6
    asyncdiff.parallelize(pipe, ["cpu"] * 2, schedule="pipeline", split="estimate")
    other = call | {"latents": call["latents"].to(memory_format=torch.channels_last)}
    assert reference.distance(draw(pipe, other), want) < 1e-6
