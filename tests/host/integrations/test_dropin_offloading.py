"""Offloading of what is beside the denoiser, and caches and offloading of the denoiser itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny_pipelines import draw, tiny_flux, tiny_sd

import asyncdiff
from asyncdiff import InputError


def pipeline() -> tuple[Any, dict[str, Any]]:
    """With a VAE beside the denoiser, and pictures asked for."""
    pipe, call = tiny_sd()
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8
    )
    pipe.register_modules(vae=vae.eval())
    return pipe, call | {"output_type": "pt", "height": 8, "width": 8}


def offload(pipe: Any, how: str) -> None:
    if how == "groups":
        pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    else:
        getattr(pipe, f"enable_{how}_cpu_offload")(device="cpu")


@pytest.mark.parametrize("how", ["model", "sequential", "groups"])
def test_other_parts_are_offloaded(how: str) -> None:
    """The denoiser is left as it is; its pipeline works as before, also afterwards."""
    pipe, call = pipeline()
    want = draw(pipe, call)
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, warmup=4, split="estimate"):
        offload(pipe, how)
        hooks = {"_hf_hook", "_diffusers_hook"}
        assert any(hooks & vars(m).keys() for m in pipe.vae.modules())
        assert "_hf_hook" not in vars(pipe.unet) and "unet" in pipe.components
        if how == "sequential":  # accelerate's own does not run where all is on the CPU
            return
        for _ in range(2):  # model offloading hooks everything anew after each call
            assert torch.equal(draw(pipe, call), want)
    assert torch.equal(draw(pipe, call), want)


def test_other_parts_of_a_pipeline_whose_denoiser_is_in_a_checkpoint(tmp_path: Path) -> None:
    """On the meta device until ranks have read it, and after that, too."""
    pipe, call = pipeline()
    want = draw(pipe, call)
    pipe.unet.save_pretrained(tmp_path)
    with torch.device("meta"):
        pipe.unet = type(pipe.unet).from_config(pipe.unet.config).eval()
    where: dict[str, Any] = {"checkpoint": tmp_path, "split": "estimate", "warmup": 4}
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, **where):
        offload(pipe, "model")
        assert "_hf_hook" not in vars(pipe.unet) and "_hf_hook" in vars(pipe.vae)
        for _ in range(2):
            assert torch.equal(draw(pipe, call), want)
        assert all(w.device.type == "meta" for w in pipe.unet.parameters())


def test_models_make_room_for_the_denoiser() -> None:
    """Which has no hook that would offload those before it."""
    pipe, call = pipeline()
    seen: list[str] = []

    class Hook:
        def offload(self) -> None:
            seen.append("offloaded")

    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, warmup=4, split="estimate"):
        pipe._all_hooks = [Hook()]
        pipe.maybe_free_model_hooks = lambda: None
        draw(pipe, call)
        assert seen == ["offloaded"]
        draw(pipe, call)
        assert seen == ["offloaded"] * 2


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("model", "offloaded by accelerate: call pipe.remove_all_hooks"),
        ("sequential", "offloaded by accelerate: call pipe.remove_all_hooks"),
        ("groups", "offloaded in groups"),
    ],
)
def test_a_denoiser_that_is_offloaded(how: str, message: str) -> None:
    pipe, call = pipeline()
    want = draw(pipe, call)
    offload(pipe, how)
    with pytest.raises(InputError, match=message):
        asyncdiff.parallelize(pipe, devices=["cpu"] * 2)
    if how != "model":
        return
    assert torch.equal(draw(pipe, call), want)
    pipe.remove_all_hooks()
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, warmup=4, split="estimate"):
        offload(pipe, how)
        assert torch.equal(draw(pipe, call), want)


def caches() -> dict[str, Any]:
    """All that this version of diffusers has."""
    no_time = {"current_timestep_callback": lambda: 500}
    made = {
        "FirstBlockCacheConfig": {},
        "FasterCacheConfig": no_time | {"is_guidance_distilled": True},
        "PyramidAttentionBroadcastConfig": no_time | {"spatial_attention_block_skip_range": 2},
        "TaylorSeerCacheConfig": {},
        "MagCacheConfig": {"num_inference_steps": 4, "calibrate": True},
        "TextKVCacheConfig": {},
        "SeaCacheConfig": {},
    }
    return {n: kwargs for n, kwargs in made.items() if hasattr(diffusers, n)}


@pytest.mark.parametrize("name", caches())
def test_a_cache_is_refused_once_and_early(name: str) -> None:
    pipe, _ = tiny_flux()
    try:
        pipe.transformer.enable_cache(getattr(diffusers, name)(**caches()[name]))
    except (ValueError, KeyError) as e:
        pytest.skip(f"diffusers has none for this transformer: {e}")
    with pytest.raises(InputError, match=r"the denoiser has a cache .* Call disable_cache"):
        asyncdiff.parallelize(pipe, devices=["cpu"] * 2)
    pipe.transformer.disable_cache()
    asyncdiff.parallelize(pipe, devices=["cpu"] * 2).restore()


def test_a_denoiser_that_diffusers_spreads() -> None:
    """Which needs several processes: its mark is enough, and so is one of its hooks."""
    hooks = pytest.importorskip("diffusers.hooks.context_parallel")
    pipe, _ = tiny_flux()
    pipe.transformer._parallel_config = diffusers.ContextParallelConfig(ring_degree=2)
    with pytest.raises(InputError, match="spread over processes by diffusers"):
        asyncdiff.parallelize(pipe, devices=["cpu"] * 2)
    pipe.transformer._parallel_config = None
    registry = diffusers.hooks.HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    hook = hooks.ContextParallelSplitHook({}, diffusers.ContextParallelConfig(ring_degree=2))
    registry.register_hook(hook, "cp_input")
    with pytest.raises(InputError, match="spread over processes by diffusers"):
        asyncdiff.parallelize(pipe, devices=["cpu"] * 2)
    registry.remove_hook("cp_input")
    asyncdiff.parallelize(pipe, devices=["cpu"] * 2).restore()
