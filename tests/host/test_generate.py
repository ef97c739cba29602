"""Whole generations by generate() equal the pipeline, and a loop around the denoiser."""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import pytest
import reference
import torch
from rotation import often
from tiny_pipelines import tiny_sd3_transformer
from toys import toy, toy_call

import asyncdiff
from asyncdiff import AsyncDenoiser, InputError, PlanError, RankError, SchedulerError

SPEC = reference.SMALL
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
#: The largest relative L2 distance between the two ways, and to the pipeline.
TOLERANCE = 1e-5
SPLITS = {
    1: [["enter", "down", "mix", "up", "leave"]],
    2: [["enter", "down"], ["mix", "up", "leave"]],
    3: [["enter", "down.0"], ["down.1", "down.2", "mix"], ["up", "leave"]],
}
#: A component in a circle, and the whole denoiser but one layer last: others read latents too.
CIRCLE = [["down.1", "down.2", "mix"], ["enter", "down.0", "up", "leave"]]


def scheduler(name: str = "DDIMScheduler", **options: Any) -> Any:
    return getattr(diffusers, name).from_config({"clip_sample": False, **SD, **options})


def unet_inputs() -> tuple[torch.Tensor, dict[str, Any]]:
    call = reference.inputs(SPEC)
    text = torch.cat([call["negative_prompt_embeds"], call["prompt_embeds"]])
    # The options that the pipeline passes.
    options = dict.fromkeys(("timestep_cond", "cross_attention_kwargs", "added_cond_kwargs"))
    return call["latents"], {"encoder_hidden_states": text, **options}


@pytest.mark.parametrize(
    ("components", "stride"),
    often([(1, 2), (2, 1), (3, 2)], itertools.product((1, 2, 3), (1, 2))),
)
def test_equals_the_pipeline(components: int, stride: int) -> None:
    """A parallelised pipeline and generate() on the same denoiser, with two schedulers."""
    pipe = reference.pipeline(SPEC)
    handle = asyncdiff.parallelize(
        pipe,
        devices=["cpu"] * (components + stride - 1),
        components=components,
        stride=stride,
        split="estimate",
    )
    denoiser = handle.denoiser
    latents, conditioning = unet_inputs()
    for warmup, name in itertools.product((1, 3), ("DDIMScheduler", "DPMSolverMultistepScheduler")):
        denoiser.configure(warmup=warmup)
        pipe.scheduler = scheduler(name)
        want = reference.run(pipe, SPEC, num_inference_steps=8)
        theirs = handle.report()
        got = denoiser.generate(
            latents * pipe.scheduler.init_noise_sigma,
            conditioning,
            scheduler(name),
            num_inference_steps=8,
            guidance_scale=SPEC["guidance_scale"],
        )
        assert reference.distance(got, want) < TOLERANCE
        report = denoiser.report()
        assert (report.steps, report.ticks) == (theirs.steps, theirs.ticks)
        assert report.exchange_bytes >= theirs.exchange_bytes
        assert report.exchange_bytes_per_tick == theirs.exchange_bytes_per_tick
    assert len(denoiser._engines) == 1  # the same calls: prepared once
    handle.restore()


def toys(components: int = 2, stride: int = 1, warmup: int = 1, **options: Any) -> AsyncDenoiser:
    options.setdefault("split", SPLITS[components])
    return AsyncDenoiser(
        toy().float(),
        devices=["cpu"] * (components + stride - 1),
        components=components,
        stride=stride,
        warmup=warmup,
        **options,
    )


def both(denoiser: AsyncDenoiser, sampler: Any, steps: int, scale: float = 1.0) -> float:
    """The distance between generate() and a loop around the denoiser."""
    call = {k: v.float() if v.is_floating_point() else v for k, v in toy_call(batch=4).items()}
    text = call["encoder_hidden_states"]
    latents = want = call["sample"][: 4 if scale <= 1 else 2]
    got = denoiser.generate(
        latents,
        {"encoder_hidden_states": text},
        sampler,
        num_inference_steps=steps,
        guidance_scale=scale,
    )
    assert got.shape == latents.shape and got.dtype == latents.dtype
    sampler.set_timesteps(steps)
    with denoiser.generation(sampler.timesteps):
        for t in sampler.timesteps:
            sample = sampler.scale_model_input(torch.cat([want] * (4 // len(want))), t)
            (noise,) = denoiser(sample, t, text)
            if scale > 1:
                a, b = noise.chunk(2)
                noise = a + scale * (b - a)
            want = sampler.step(noise, t, want, return_dict=False)[0]
    return reference.distance(got, want)


@pytest.mark.parametrize(
    ("components", "stride"),
    often([(1, 3), (2, 1), (3, 2)], itertools.product((1, 2, 3), repeat=2)),
)
def test_every_shape_of_plan(components: int, stride: int) -> None:
    """All numbers of left-over steps in the last tick, guided and not."""
    for warmup, shift in ((1, False), (3, True)):
        denoiser = toys(components, stride, warmup, time_shift=shift)
        for steps in (warmup, 4, 5, 7, 9):
            assert both(denoiser, scheduler(), steps) < TOLERANCE
        for name in ("EulerDiscreteScheduler", "UniPCMultistepScheduler", "PNDMScheduler"):
            assert both(denoiser, scheduler(name), 7, 5.0) < TOLERANCE
        denoiser.close()


@pytest.mark.parametrize("stride", [1, 2])
def test_components_in_a_circle(stride: int) -> None:
    denoiser = toys(2, stride, split=CIRCLE)
    assert both(denoiser, scheduler(), 8, 3.0) < TOLERANCE
    assert denoiser.partition.exact_order == (1, 0, 1)
    denoiser.close()


def test_generations_share_memory_and_change_everything_else() -> None:
    """Other latents, guidance and scheduler: nothing is left over."""
    denoiser = toys(2, 2)
    call = {k: v.float() for k, v in toy_call(batch=2).items()}

    def run(seed: int, scale: float, name: str = "DDIMScheduler") -> torch.Tensor:
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        text = {"encoder_hidden_states": call["encoder_hidden_states"] * (seed + 1)}
        return denoiser.generate(
            latents, text, scheduler(name), num_inference_steps=6, guidance_scale=scale
        )

    first = run(0, 4.0)
    other = run(1, 2.0, "EulerDiscreteScheduler")
    assert torch.equal(run(0, 4.0), first)
    assert torch.equal(run(1, 2.0, "EulerDiscreteScheduler"), other)
    assert not torch.equal(run(0, 4.0, "EulerDiscreteScheduler"), first)
    run(0, 4.0, "DPMSolverMultistepScheduler")
    assert torch.equal(run(0, 4.0), first)
    denoiser.close()


def test_latents_and_scheduler_are_left_alone() -> None:
    denoiser = toys()
    call = toy_call()
    latents = call["sample"].float()
    kept, sampler = latents.clone(), scheduler("DPMSolverMultistepScheduler")
    text = {"encoder_hidden_states": call["encoder_hidden_states"].float()}
    denoiser.generate(latents, text, sampler, num_inference_steps=4)
    assert torch.equal(latents, kept)
    assert sampler.step_index is None
    # Timesteps that were set before are used as they are.
    sampler.set_timesteps(5)
    denoiser.generate(latents, text, sampler)
    assert denoiser.report().steps == 5
    denoiser.close()


def test_in_inference_mode_and_without() -> None:
    """What is prepared in one is used in the other."""
    for first in (True, False):
        denoiser = toys()
        results = []
        for mode in (first, not first):
            with torch.inference_mode(mode):
                call = {k: v.float() for k, v in toy_call().items()}
                text = {"encoder_hidden_states": call["encoder_hidden_states"]}
                results.append(
                    denoiser.generate(call["sample"], text, scheduler(), num_inference_steps=4)
                )
        assert all(reference.distance(r, results[0]) < TOLERANCE for r in results)
        denoiser.close()


def test_stochastic_and_clipping_schedulers() -> None:
    denoiser = toys()
    call = toy_call()
    latents, text = call["sample"].float(), call["encoder_hidden_states"].float()
    plain = {k: scheduler(k) for k in ("DDPMScheduler", "EulerAncestralDiscreteScheduler")}
    plain["clipped"] = scheduler(clip_sample=True)
    for name, sampler in plain.items():
        options = {"generator": torch.Generator().manual_seed(1)} if name != "clipped" else {}
        got = denoiser.generate(
            latents,
            {"encoder_hidden_states": text},
            sampler,
            num_inference_steps=6,
            step_options=options,
        )
        sampler.set_timesteps(6)
        if options:
            options = {"generator": torch.Generator().manual_seed(1)}
        want = latents
        with denoiser.generation(sampler.timesteps):
            for t in sampler.timesteps:
                (noise,) = denoiser(sampler.scale_model_input(want, t), t, text)
                want = sampler.step(noise, t, want, **options, return_dict=False)[0]
        assert torch.equal(got, want), name
    denoiser.close()


def test_callbacks_see_and_change_latents() -> None:
    denoiser = toys()
    call = toy_call()
    text = {"encoder_hidden_states": call["encoder_hidden_states"].float()}
    seen: list[tuple[int, int]] = []

    def look(step: int, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor | None:
        seen.append((step, int(t)))
        return latents * 0 if step == 3 else None

    out = denoiser.generate(
        call["sample"].float(), text, scheduler(), num_inference_steps=4, callback=look
    )
    assert [s for s, _ in seen] == [0, 1, 2, 3]
    assert [t for _, t in seen] == sorted((t for _, t in seen), reverse=True)
    assert not out.any()
    denoiser.close()


def test_transformers_with_their_own_timestep() -> None:
    """SD3 passes a timestep for each picture, FLUX t/1000; latents are tokens or pictures."""
    sd3 = tiny_sd3_transformer()
    denoiser = AsyncDenoiser(sd3, devices=["cpu"] * 3, stride=2, warmup=2, split="estimate")
    conditioning = {
        "encoder_hidden_states": torch.randn(2, 8, 32),
        "pooled_projections": torch.randn(2, 24),
    }
    latents = torch.randn(1, 4, 8, 8)
    got = denoiser.generate(
        latents,
        conditioning,
        sampler := diffusers.FlowMatchEulerDiscreteScheduler(),
        num_inference_steps=7,
        guidance_scale=3.0,
        timestep_argument=lambda t: t.expand(2),
    )
    sampler.set_timesteps(7)
    with denoiser.generation(sampler.timesteps):
        for t in sampler.timesteps:
            noise = denoiser(
                torch.cat([latents] * 2), timestep=t.expand(2), **conditioning, return_dict=False
            )[0]
            a, b = noise.chunk(2)
            latents = sampler.step(a + 3.0 * (b - a), t, latents, return_dict=False)[0]
    assert reference.distance(got, latents) < TOLERANCE
    denoiser.close()


def test_float32_latents_of_a_half_precision_denoiser() -> None:
    """The latents keep their own precision; the denoiser's input is rounded."""
    denoiser = AsyncDenoiser(toy().half(), devices=["cpu"] * 2, split=SPLITS[2])
    call = toy_call()
    text = call["encoder_hidden_states"].half()
    latents = call["sample"].float()
    got = denoiser.generate(
        latents, {"encoder_hidden_states": text}, scheduler(), num_inference_steps=8
    )
    (sampler := scheduler()).set_timesteps(8)
    with denoiser.generation(sampler.timesteps):
        for t in sampler.timesteps:
            noise = denoiser(latents.half(), t, text)[0].float()
            latents = sampler.step(noise, t, latents, return_dict=False)[0]
    assert got.dtype is torch.float32
    assert reference.distance(got, latents) < 1e-6
    denoiser.close()


def test_a_rank_that_fails_and_the_generation_after() -> None:
    denoiser = toys(3)
    call = toy_call()
    text = {"encoder_hidden_states": call["encoder_hidden_states"].float()}

    def run() -> torch.Tensor:
        return denoiser.generate(call["sample"].float(), text, scheduler(), num_inference_steps=6)

    want = run()
    worker = denoiser._engine.workers[1]  # type: ignore[union-attr]
    sound, left = worker.execute, [3]

    def broken(slots: Any, *place: int) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("a cosmic ray")
        return sound(slots, *place)

    worker.execute = broken  # type: ignore[method-assign]
    with pytest.raises(RankError, match=r"rank 1 .*cosmic ray"):
        run()
    worker.execute = sound  # type: ignore[method-assign]
    assert torch.equal(run(), want)
    denoiser.close()


def test_what_cannot_be_generated_says_why() -> None:
    denoiser = toys(2, 1, 3)
    call = toy_call()
    latents = call["sample"].float()
    text = {"encoder_hidden_states": call["encoder_hidden_states"].float()}

    def refused(error: type[Exception], words: str, **options: Any) -> None:
        arguments: dict[str, Any] = {
            "latents": latents,
            "conditioning": text,
            "scheduler": scheduler(),
            "num_inference_steps": 4,
        }
        with pytest.raises(error, match=words):
            denoiser.generate(**arguments | options)

    refused(PlanError, "warmup=3 exceeds", num_inference_steps=2)
    refused(InputError, "not both", timesteps=[900, 500])
    refused(SchedulerError, "takes no list", timesteps=[900, 500], num_inference_steps=None)
    refused(InputError, "conditioning holds sample", conditioning=text | {"sample": latents})
    refused(InputError, "no argument|cannot be called", conditioning={"words": 1})
    denoiser.close()
