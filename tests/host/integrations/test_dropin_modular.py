"""Modular pipelines: built of blocks, guided by guiders, which may put hooks on layers for one of
the calls in a step."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import reference
import torch
from diffusers import guiders
from diffusers.hooks import LayerSkipConfig, SmoothedEnergyGuidanceConfig
from diffusers.modular_pipelines import SequentialPipelineBlocks
from diffusers.modular_pipelines.stable_diffusion_xl import before_denoise, denoise
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from rotation import often
from tiny_pipelines import tiny_unet

import asyncdiff
from asyncdiff import InputError

STEPS = 4
#: The transformer blocks of the UNet's middle.
MIDDLE = "mid_block.attentions.0.transformer_blocks"


def modular(guider: Any = None) -> tuple[Any, dict[str, Any]]:
    """SDXL around a tiny UNet, from embeddings to latents."""
    prefix = "StableDiffusionXL"
    blocks = {
        "input": getattr(before_denoise, f"{prefix}InputStep")(),
        "set_timesteps": getattr(before_denoise, f"{prefix}SetTimestepsStep")(),
        "prepare_latents": getattr(before_denoise, f"{prefix}PrepareLatentsStep")(),
        "condition": getattr(before_denoise, f"{prefix}PrepareAdditionalConditioningStep")(),
        "denoise": getattr(denoise, f"{prefix}DenoiseStep")(),
    }
    pipe = SequentialPipelineBlocks.from_blocks_dict(blocks).init_pipeline()
    embedding = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}
    pipe.update_components(
        unet=tiny_unet(addition_embed_type="text_time", **embedding),
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4),
        scheduler=diffusers.EulerDiscreteScheduler(),
        guider=guider or guiders.ClassifierFreeGuidance(guidance_scale=5.0),
    )
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    shapes = {"prompt_embeds": (1, 8, 32), "pooled_prompt_embeds": (1, 32)}
    call: dict[str, Any] = {
        f"{negative}{name}": torch.randn(*shape, generator=generator)
        for name, shape in shapes.items()
        for negative in ("", "negative_")
    }
    call["latents"] = torch.randn(1, 4, 8, 8, generator=generator)
    return pipe, call | {"height": 64, "width": 64, "num_inference_steps": STEPS}


def draw(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    return pipe(**call, generator=torch.Generator().manual_seed(2), output="latents")


def skipping(**what: bool) -> LayerSkipConfig:
    return LayerSkipConfig([0], fqn=MIDDLE, **what)


#: Guiders by name, and how many calls their steps have, the fewest and the most.
GUIDERS: dict[str, tuple[Any, set[int]]] = {
    "guidance": (lambda: guiders.ClassifierFreeGuidance(guidance_scale=5.0), {2}),
    "none": (lambda: guiders.ClassifierFreeGuidance(guidance_scale=1.0), {1}),
    "in the middle": (
        lambda: guiders.ClassifierFreeGuidance(guidance_scale=5.0, start=0.25, stop=0.75),
        {1, 2},
    ),
    "zero star": (lambda: guiders.ClassifierFreeZeroStarGuidance(guidance_scale=5.0), {2}),
    "projected": (lambda: guiders.AdaptiveProjectedGuidance(guidance_scale=5.0), {2}),
    "tangential": (lambda: guiders.TangentialClassifierFreeGuidance(guidance_scale=5.0), {2}),
    "auto": (lambda: guiders.AutoGuidance(auto_guidance_config=skipping(), dropout=1.0), {2}),
    "skip layers": (
        lambda: guiders.SkipLayerGuidance(
            skip_layer_config=skipping(),
            skip_layer_guidance_start=0.25,
            skip_layer_guidance_stop=0.75,
        ),
        {2, 3},
    ),
    "perturbed": (
        lambda: guiders.PerturbedAttentionGuidance(
            perturbed_guidance_config=skipping(
                skip_attention=False, skip_attention_scores=True, skip_ff=False
            ),
            perturbed_guidance_start=0.0,
            perturbed_guidance_stop=1.0,
        ),
        {2, 3},
    ),
    "smoothed": (
        lambda: guiders.SmoothedEnergyGuidance(
            seg_guidance_config=SmoothedEnergyGuidanceConfig([0], fqn=MIDDLE),
            seg_guidance_start=0.0,
            seg_guidance_stop=1.0,
        ),
        {2, 3},
    ),
}


#: Tried every time: steps of one call and of two, a guider that keeps something.
OFTEN = ("in the middle", "projected")


@pytest.mark.parametrize("name", often(OFTEN, GUIDERS))
def test_guiders_are_the_same(name: str) -> None:
    """Hooks of one call in a step are a branch's own."""
    make, calls = GUIDERS[name]
    pipe, call = modular(make())
    want, counted = draw(pipe, call), [0]

    def count(module: Any, args: Any) -> None:
        counted[0] += 1

    pipe.unet.register_forward_pre_hook(count)
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, warmup=STEPS, split="estimate") as handle:
        assert reference.distance(draw(pipe, call), want) < 1e-5
        assert STEPS * min(calls) <= counted[0] <= STEPS * max(calls)
        engines = len(handle.denoiser._engines)
        # diffusers 0.42's smoothed guidance never puts its hooks on.
        hooked = name in ("auto", "skip layers", "perturbed") or (
            engines > 1 and name == "smoothed"
        )
        assert engines == 1 + hooked
        assert reference.distance(draw(pipe, call), want) < 1e-5
        assert len(handle.denoiser._engines) == engines  # nothing was prepared anew
    assert torch.equal(draw(pipe, call), want)


@pytest.mark.slow
def test_hooks_of_smoothed_energy() -> None:
    from diffusers.hooks import smoothed_energy_guidance_utils as smoothed

    pipe, call = modular()
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, warmup=STEPS, split="estimate") as handle:
        before = draw(pipe, call)
        config = SmoothedEnergyGuidanceConfig([0], fqn=MIDDLE)
        smoothed._apply_smoothed_energy_guidance_hook(pipe.unet, config, 5.0, name="smoothed")
        got = draw(pipe, call)
        assert len(handle.denoiser._engines) == 2
    assert reference.distance(got, draw(pipe, call)) < 1e-5 < reference.distance(got, before)


@pytest.mark.slow
def test_guiders_with_asynchronous_steps() -> None:
    """A branch with hooks keeps its history: its engine is the same in every step."""
    make, _ = GUIDERS["perturbed"]
    pipe, call = modular(make())
    want = draw(pipe, call)
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, warmup=1, split="estimate") as handle:
        got = draw(pipe, call)
        assert torch.equal(draw(pipe, call), got)
        report = handle.report()
        assert (report.steps, report.warmup) == (STEPS, 1) and "3 calls" in str(report)
    assert 1e-5 < reference.distance(got, want) < 1


def test_a_quality_knows_of_the_guider() -> None:
    """Before the second call of the first step."""
    pipe, call = modular()
    want = draw(pipe, call)
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, quality="exact") as handle:
        assert reference.distance(draw(pipe, call), want) < 1e-5
        assert "split" in handle.settings


def test_guidance_that_begins_later_is_split() -> None:
    """The first step has one call, and is known not to be half of a batch."""
    make, _ = GUIDERS["in the middle"]
    pipe, call = modular(make())
    want = draw(pipe, call)
    settings: dict[str, Any] = {"components": 1, "guidance": "split", "warmup": STEPS}
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, **settings):
        assert reference.distance(draw(pipe, call), want) < 1e-5


def test_wan_of_blocks() -> None:
    torch.manual_seed(0)
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=32,
    )
    pipe = WanCoreDenoiseStep().init_pipeline()
    guider = guiders.SkipLayerGuidance(
        skip_layer_config=LayerSkipConfig([1], fqn="blocks"), skip_layer_guidance_start=0.0
    )
    pipe.update_components(
        transformer=transformer.eval().requires_grad_(False),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        guider=guider,
    )
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {
        name: torch.randn(1, 8, 16) for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    call |= {"latents": torch.randn(1, 4, 2, 4, 4), "height": 32, "width": 32, "num_frames": 5}
    call["num_inference_steps"] = STEPS
    want = draw(pipe, call)
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, warmup=STEPS, split="estimate"):
        assert reference.distance(draw(pipe, call), want) < 1e-5


def test_a_manager_that_offloads() -> None:
    """As ComponentsManager does it on GPUs, by a hook of accelerate on each model."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    pipe, call = modular()
    want = draw(pipe, call)
    add_hook_to_module(pipe.unet, ModelHook())
    with pytest.raises(InputError, match="disable_auto_cpu_offload"):
        asyncdiff.parallelize(pipe, devices=["cpu"] * 2)
    remove_hook_from_module(pipe.unet, recurse=True)
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, warmup=STEPS, split="estimate"):
        assert reference.distance(draw(pipe, call), want) < 1e-5
