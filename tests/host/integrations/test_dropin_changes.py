"""The drop-in where a denoiser, or what it is given, changes in the middle of a generation, and
where others have changed it before."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import diffusers
import pytest
import reference
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from tiny_pipelines import draw, tiny_flux, tiny_sd
from toys import toy, toy_call

import asyncdiff
from asyncdiff import AsyncDenoiser, InputError, SchedulerError
from asyncdiff.integrations.diffusers.timesteps import TimestepTracker

CALL = tiny_sd()[1]
STEPS = 6


def pipeline() -> Any:
    pipe = tiny_sd()[0]
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return pipe


def spread(pipe: Any, **settings: Any) -> asyncdiff.Handle:
    options: dict[str, Any] = {"devices": ["cpu"] * 2, "split": "estimate", "quality": None}
    return asyncdiff.parallelize(pipe, **options | settings)


def run(pipe: Any, **options: Any) -> torch.Tensor:
    return draw(pipe, CALL, num_inference_steps=STEPS, **options)


def freeu(at: int) -> Any:
    def callback(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
        return kwargs

    return callback


def test_options_that_a_callback_changes() -> None:
    pipe = pipeline()
    want = run(pipe, callback_on_step_end=freeu(1))
    pipe.disable_freeu()
    without = run(pipe)
    assert reference.distance(without, want) > 1e-3
    handle = spread(pipe, warmup=STEPS)
    for _ in range(2):
        assert reference.distance(run(pipe, callback_on_step_end=freeu(1)), want) < 1e-5
        assert handle.report().steps == handle.report().warmup == STEPS - 2
        pipe.disable_freeu()
        assert reference.distance(run(pipe), without) < 1e-5
    assert len(handle.denoiser._engines) == 2  # of the denoiser with and without it
    handle.restore()


@pytest.mark.parametrize(
    ("settings", "left"),
    [({}, 3), ({"exact_tail": 2}, 3), ({"exact_tail": 2}, 1), ({"schedule": "wavefront"}, 3)],
)
def test_guidance_that_ends_early(settings: dict[str, Any], left: int) -> None:
    """The batch is halved then: the rest is a generation of its own, exact as far as asked for."""
    pipe = pipeline()
    ends: dict[str, Any] = {
        "callback_on_step_end": SDCFGCutoffCallback(
            cutoff_step_ratio=None, cutoff_step_index=STEPS - left - 1
        ),
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    want = run(pipe, **ends)
    handle = spread(pipe, warmup=2, **settings)
    got = run(pipe, **ends)
    report = handle.report()
    tail = settings.get("exact_tail", 0)
    assert (report.steps, report.warmup) == (left, left if 2 + tail > left else 2)
    assert 0 < reference.distance(got, want) < 1
    assert (handle.config.warmup, handle.config.exact_tail) == (2, tail)
    handle.denoiser.configure(warmup=STEPS, exact_tail=0)
    assert reference.distance(run(pipe, **ends), want) < 1e-5
    handle.restore()


def test_other_inputs_in_a_step_that_was_not_due() -> None:
    pipe = pipeline()
    handle = spread(pipe)
    pipe.scheduler.set_timesteps(STEPS)
    call = CALL
    text, noise = call["prompt_embeds"], torch.randn(2, 4, 8, 8)
    time = pipe.scheduler.timesteps[0]
    pipe.unet(noise, time, encoder_hidden_states=text.expand(2, -1, -1))
    with pytest.raises(SchedulerError, match="more or less often than once for each"):
        pipe.unet(noise[:1], time, encoder_hidden_states=text)
    handle.restore()


@pytest.mark.slow
def test_inputs_that_change_in_every_step() -> None:
    """Each of them would be exported and compiled."""
    pipe = pipeline()
    handle = spread(pipe)
    pipe.scheduler.set_timesteps(STEPS)
    text, noise = CALL["prompt_embeds"], torch.randn(STEPS, 4, 8, 8)
    with pytest.raises(InputError, match="in every step"):
        for k, time in enumerate(pipe.scheduler.timesteps):
            pipe.unet(noise[k:], time, encoder_hidden_states=text.expand(STEPS - k, -1, -1))
    assert k == 3
    handle.restore()


def test_the_step_in_which_inputs_changed() -> None:
    denoiser = AsyncDenoiser(toy(), devices=["cpu"] * 2, split="estimate")
    call = toy_call()
    with denoiser.generation([9, 8, 7, 6]):
        for t in (9, 8):
            denoiser(call["sample"], torch.tensor(t), call["encoder_hidden_states"])
        with pytest.raises(InputError, match="changed in step 2 of a generation"):
            denoiser(call["sample"].half(), torch.tensor(7), call["encoder_hidden_states"])
    denoiser.close()


def test_times_of_the_rest() -> None:
    ddim = diffusers.DDIMScheduler()
    ddim.set_timesteps(10)
    for first in (ddim.timesteps[0], ddim.timesteps[0].clone()):
        rest = TimestepTracker(ddim, first).after(4)
        assert rest.start == 4 and torch.equal(rest.values, ddim.timesteps[4:])
        rest.check(0, ddim.timesteps[4])
        rest.check(1, ddim.timesteps[5].clone())
        with pytest.raises(SchedulerError, match="timestep 300 was due"):
            rest.check(2, ddim.timesteps[8])


def test_parts_that_have_another_time() -> None:
    """Image to video: the first frame is given, and has time 0."""
    pipe = pipeline()
    pipe.scheduler.set_timesteps(STEPS)
    text, noise = CALL["prompt_embeds"].expand(2, -1, -1), torch.randn(2, 4, 8, 8)

    def steps() -> list[torch.Tensor]:
        return [
            pipe.unet(noise, torch.tensor([0, int(t)]), encoder_hidden_states=text).sample
            for t in pipe.scheduler.timesteps
        ]

    want = steps()
    handle = spread(pipe, warmup=STEPS)
    for got, due in zip(steps(), want, strict=True):
        assert reference.distance(got, due) < 1e-5
    assert handle.report().steps == STEPS
    handle.restore()
    for wrong in ({"stride": 2, "devices": ["cpu"] * 3}, {"schedule": "wavefront"}):
        handle = spread(pipe, **wrong)
        with pytest.raises(SchedulerError, match=r"several timesteps at once.* stride=1"):
            steps()
        handle.restore()


def test_fewer_steps_are_left_than_are_to_be_exact() -> None:
    """As in image to image with little strength: all of them are exact."""
    pipe = pipeline()
    pipe.scheduler.set_timesteps(STEPS)
    text = CALL["prompt_embeds"]
    latents, times = torch.randn(1, 4, 8, 8), pipe.scheduler.timesteps[4:]
    want = [pipe.unet(latents, t, encoder_hidden_states=text).sample for t in times]
    handle = spread(pipe, warmup=4, exact_tail=1)
    for t, due in zip(times, want, strict=True):
        got = pipe.unet(latents, t, encoder_hidden_states=text).sample
        assert reference.distance(got, due) < 1e-5
    assert (handle.report().steps, handle.report().warmup) == (2, 2)
    assert (handle.config.warmup, handle.config.exact_tail) == (4, 1)
    run(pipe)
    assert (handle.report().steps, handle.report().warmup) == (STEPS, 4)
    handle.restore()


def test_hooks_of_diffusers_are_refused() -> None:
    """An export would drop a cache, or freeze what it just then does."""
    pipe, call = tiny_flux()
    pipe.set_progress_bar_config(disable=True)
    config = diffusers.FirstBlockCacheConfig(threshold=0.1)
    options: dict[str, Any] = {"devices": ["cpu"] * 2, "split": "estimate", "components": 2}

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return pipe(**call, num_inference_steps=3, generator=generator, output_type="latent").images

    pipe.transformer.enable_cache(config)
    with pytest.raises(InputError, match=r"has a cache \(fbc_.*disable_cache"):
        asyncdiff.parallelize(pipe, **options)
    pipe.transformer.disable_cache()
    handle = asyncdiff.parallelize(pipe, **options)
    want = draw()
    pipe.transformer.enable_cache(config)
    with pytest.raises(InputError, match="has a cache"):
        draw()
    pipe.transformer.disable_cache()
    assert torch.equal(draw(), want)
    # A hook of the denoiser itself, which goes on with the forward that it found.
    hook = diffusers.hooks.HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    hook.register_hook(diffusers.hooks.ModelHook(), "mine")
    with pytest.raises(InputError, match=r"hooks of diffusers|forward was replaced"):
        draw()
    handle.restore()
    assert draw().isfinite().all()


@pytest.mark.slow
def test_denoisers_that_torch_compiles() -> None:
    pipe = pipeline()
    want = run(pipe)
    pipe.unet.compile(backend="eager")
    handle = spread(pipe, warmup=STEPS)
    assert reference.distance(run(pipe), want) < 1e-5
    with pytest.raises(InputError, match="compile=True"):
        pipe.unet.compile()
    unet = pipe.unet
    pipe.unet = torch.compile(unet, backend="eager")
    assert reference.distance(run(pipe), want) < 1e-5
    pipe.unet = unet
    handle.restore()
    assert unet._compiled_call_impl is not None
    pipe.unet = torch.compile(unet, backend="eager")
    with pytest.raises(InputError, match="wrapped by torch"):
        spread(pipe)


def test_copies() -> None:
    pipe = pipeline()
    handle = spread(pipe, warmup=STEPS)
    want = run(pipe)
    for copied in (copy.deepcopy, pickle.dumps):
        for what in (pipe, pipe.unet):
            with pytest.raises(InputError, match="restore"):
                copied(what)
    assert torch.equal(run(copy.copy(pipe)), want)
    handle.restore()
    assert copy.deepcopy(pipe.unet) is not pipe.unet


def test_a_call_inside_a_call() -> None:
    pipe = pipeline()
    handle = spread(pipe)

    def again(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        run(pipe)
        return kwargs

    with pytest.raises(InputError, match="in the middle of a call of its own"):
        run(pipe, callback_on_step_end=again)
    want = run(pipe)
    assert torch.equal(run(pipe), want)
    handle.restore()


def test_callbacks_that_interrupt_or_change_the_prompt() -> None:
    """As diffusers documents both; what comes after is as ever."""
    pipe = pipeline()

    def interrupts(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 2
        return kwargs

    def changes(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        embeds = kwargs["prompt_embeds"]
        return {"prompt_embeds": embeds.flip(1) * 20.0} if step == 2 else {}

    ends = {"callback_on_step_end": interrupts}
    other = {
        "callback_on_step_end": changes,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    want = [run(pipe, **options) for options in ({}, ends, other)]
    assert all(reference.distance(w, want[0]) > 1e-3 for w in want[1:])
    handle = spread(pipe, warmup=STEPS)
    for _ in range(2):
        for options, due in zip(({}, ends, other), want, strict=True):
            assert reference.distance(run(pipe, **options), due) < 1e-5
    assert len(handle.denoiser._engines) == 1
    handle.restore()


@pytest.mark.slow
def test_pipelines_that_share_a_denoiser_take_turns() -> None:
    """One is parallelised, the other made of it; with batches of other sizes in between."""
    pipe = pipeline()
    other = diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    two = {k: torch.cat([v, v]) for k, v in CALL.items() if isinstance(v, torch.Tensor)}
    want = [run(pipe), draw(pipe, CALL | two, num_inference_steps=STEPS)]
    handle = spread(pipe, warmup=STEPS)
    for each in (pipe, other, pipe):
        assert reference.distance(run(each), want[0]) < 1e-5
        both = draw(each, CALL | two, num_inference_steps=STEPS)
        assert reference.distance(both, want[1]) < 1e-5
    handle.restore()
    assert torch.equal(run(other), want[0])


def tiny_wan() -> Any:
    """Two denoisers, guidance in two calls, prompts of two lengths."""
    torch.manual_seed(0)
    both = [
        diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            rope_max_seq_len=32,
        ).eval()
        for _ in range(2)
    ]
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1
    ).eval()
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0),
        transformer=both[0],
        transformer_2=both[1],
        boundary_ratio=0.6,
    )
    pipe.set_progress_bar_config(disable=True)
    call = {
        "prompt_embeds": torch.randn(1, 8, 32),
        "negative_prompt_embeds": torch.randn(1, 5, 32),
        "height": 16,
        "width": 16,
        "num_frames": 5,
        "num_inference_steps": 8,
        "guidance_scale": 4.0,
        "guidance_scale_2": 3.0,
    }
    return pipe, call


@pytest.mark.parametrize(
    ("settings", "near"),
    [
        ({"components": 2, "warmup": 99}, 1e-5),
        *(
            pytest.param(settings, near, marks=pytest.mark.slow)
            for settings, near in (
                ({"components": 2, "warmup": 1, "schedule": "wavefront"}, 0.6),
                ({"components": 1, "guidance": "split"}, 1e-5),
                ({"components": 2, "warmup": 1}, 0.6),
                ({"quality": "exact"}, 1e-5),
            )
        ),
    ],
    ids=str,
)
def test_two_denoisers(settings: dict[str, Any], near: float) -> None:
    """Each has its steps, and exact ones at their beginning; guidance is in two calls."""
    pipe, call = tiny_wan()
    want = draw(pipe, call)
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, split="estimate", **settings) as handle:
        for _ in range(2):
            assert reference.distance(draw(pipe, call), want) < near
        report, steps = handle.report(), [d.report().steps for d in handle.denoisers]
        assert report.branches == 2 and report.steps == 8 == sum(steps) and min(steps) > 1
        assert "WanTransformer3DModel and WanTransformer3DModel" in repr(handle)
    assert torch.equal(draw(pipe, call), want)


def test_a_denoiser_that_is_named() -> None:
    pipe, call = tiny_wan()
    want = draw(pipe, call)
    with asyncdiff.parallelize(
        pipe,
        devices=["cpu"] * 2,
        split="estimate",
        denoiser="transformer_2",
        components=2,
        warmup=9,
    ) as handle:
        assert reference.distance(draw(pipe, call), want) < 1e-5
        later = handle.report().steps
    with asyncdiff.parallelize(
        pipe,
        devices=["cpu"] * 2,
        split="estimate",
        denoiser="transformer",
        components=2,
        warmup=1,
        exact_tail=1,
    ) as handle:
        draw(pipe, call)
        assert handle.report().steps == 8 - later and 0 < later < 8
    for wrong in ("unet", "vae_scale_factor_spatial"):
        with pytest.raises(InputError, match="has no model of that name; it has transformer"):
            asyncdiff.parallelize(pipe, devices=["cpu"] * 2, denoiser=wrong)
    with pytest.raises(InputError, match="its own checkpoint"):
        asyncdiff.parallelize(pipe, devices=["cpu"] * 2, checkpoint="folder")


def test_two_threads_that_prepare_at_once() -> None:
    """torch.export sets modes of the whole process."""
    pipes = [pipeline() for _ in range(2)]
    want = run(pipes[0])
    handles = [spread(pipe, warmup=STEPS) for pipe in pipes]
    got: list[Any] = [None, None]

    def work(i: int) -> None:
        got[i] = run(pipes[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(g is not None and reference.distance(g, want) < 1e-5 for g in got)
    assert not torch.compiler.is_exporting()
    for handle in handles:
        handle.restore()
