"""Pipelines of diffusers around the published denoisers, and what they are called with.

Denoisers have random weights at their published sizes. What comes before them and after them is
left out: text is given as embeddings, and latents are returned. Stable Video Diffusion takes a
picture, which two small models encode.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from denoise.models import MODELS, TRIES, Published

#: Of Stable Diffusion, SDXL and AnimateDiff.
_BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
_FLOW = "FlowMatchEulerDiscreteScheduler"
#: What ``--sampler`` may name: the scheduler's class and configuration, and how many steps are
#: usual.
SAMPLERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "ddim": ("DDIMScheduler", {**_BETAS, "clip_sample": False}, 50),
    "dpm": ("DPMSolverMultistepScheduler", {**_BETAS, "use_karras_sigmas": True}, 25),
    "flow": (_FLOW, {"shift": 3.0}, 28),
    "flow-dynamic": (_FLOW, {"shift": 3.0, "max_shift": 1.15, "use_dynamic_shifting": True}, 28),
    "svd": (
        "EulerDiscreteScheduler",
        {**_BETAS, "prediction_type": "v_prediction", "timestep_type": "continuous"}
        | {"use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0},
        25,
    ),
}


@dataclass(frozen=True)
class Pipeline:
    """``cls``: of diffusers. ``samplers``: that serve it, its own first. ``call``: arguments of a
    call. ``given``: the others, from the denoiser's inputs, by the arguments' names. ``encoders``:
    makes the parts that it has beside the denoiser and the scheduler; the others are None."""

    cls: str
    samplers: tuple[str, ...]
    call: Mapping[str, Any]
    given: Callable[[Mapping[str, Any]], dict[str, Any]]
    encoders: Callable[[], dict[str, Any]] = dict


def _pairs(inputs: Mapping[str, Any], *names: tuple[str, str]) -> dict[str, Any]:
    """Embeddings of both conditions: the first row is the unconditional one."""
    out = {}
    for ours, theirs in names:
        value = inputs[ours] if ours in inputs else inputs["added_cond_kwargs"][ours]
        out[f"negative_{theirs}"], out[theirs] = value[:1], value[1:2]
    return out


_TEXT = ("encoder_hidden_states", "prompt_embeds")


def _text(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return _pairs(inputs, _TEXT)


def _sdxl(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return _pairs(inputs, _TEXT, ("text_embeds", "pooled_prompt_embeds"))


def _sd3(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return _pairs(inputs, _TEXT, ("pooled_projections", "pooled_prompt_embeds"))


def _flux(inputs: Mapping[str, Any]) -> dict[str, Any]:
    text, pooled = inputs["encoder_hidden_states"], inputs["pooled_projections"]
    return {"prompt_embeds": text, "pooled_prompt_embeds": pooled}


def _wan(inputs: Mapping[str, Any]) -> dict[str, Any]:
    text = inputs["encoder_hidden_states"]
    return {"prompt_embeds": text, "negative_prompt_embeds": text.flip(1)}


def _picture(_: Mapping[str, Any]) -> dict[str, Any]:
    from PIL import Image

    return {"image": Image.new("RGB", (1024, 576), "gray")}


def _of_pictures() -> dict[str, Any]:
    """Small models that stand in for Stable Video Diffusion's."""
    from diffusers import AutoencoderKLTemporalDecoder
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=1,
        projection_dim=1024,
        patch_size=32,
    )
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        layers_per_block=1,
    )
    return {
        "vae": vae,
        "image_encoder": CLIPVisionModelWithProjection(config),
        "feature_extractor": CLIPImageProcessor(),
    }


_GUIDED = {"guidance_scale": 5.0}
_STABLE = Pipeline(
    *("StableDiffusionPipeline", ("ddim", "dpm"), _GUIDED, _text),
    encoders=lambda: {"requires_safety_checker": False},
)
_FLUX = Pipeline("FluxPipeline", ("flow-dynamic",), {"guidance_scale": 3.5}, _flux)
#: By the denoiser's key in :mod:`denoise.models`.
PIPELINES = {
    "sd15": _STABLE,
    "sd21": _STABLE,
    "sdxl": Pipeline("StableDiffusionXLPipeline", ("ddim", "dpm"), _GUIDED, _sdxl),
    "svd": Pipeline(
        "StableVideoDiffusionPipeline",
        ("svd",),
        {"num_frames": 25, "max_guidance_scale": 3.0},
        _picture,
        encoders=_of_pictures,
    ),
    "animatediff": Pipeline(
        "AnimateDiffPipeline", ("ddim", "dpm"), {**_GUIDED, "num_frames": 16}, _text
    ),
    "sd3": Pipeline("StableDiffusion3Pipeline", ("flow",), _GUIDED, _sd3),
    "flux": _FLUX,
    "wan": Pipeline("WanPipeline", ("flow",), {**_GUIDED, "num_frames": 81}, _wan),
    "tiny": _STABLE,
    "tiny-sdxl": Pipeline("StableDiffusionXLPipeline", ("ddim", "dpm"), _GUIDED, _sdxl),
    "tiny-flux": _FLUX,
    "tiny-wan": Pipeline("WanPipeline", ("flow",), {**_GUIDED, "num_frames": 9}, _wan),
}


def models() -> dict[str, Published]:
    """The denoisers that there are pipelines for, by their keys."""
    return {key: model for key, model in (MODELS | TRIES).items() if key in PIPELINES}


def build(key: str, sampler: str, device: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The pipeline of a denoiser on ``device``, and the arguments of a call but for the number of
    steps and the generator."""
    import diffusers

    model, published = models()[key], PIPELINES[key]
    denoiser = model.build(device, dtype)
    inputs = model.inputs(denoiser)
    scheduler, config, _ = SAMPLERS[sampler]
    cls = getattr(diffusers, published.cls)
    takes = inspect.signature(cls).parameters.values()
    parts = {p.name: None if p.default is p.empty else p.default for p in takes}
    name = "unet" if "unet" in parts else "transformer"
    for part, value in published.encoders().items():
        if isinstance(value, torch.nn.Module):
            torch.nn.Module.to(value, device, dtype)  # diffusers' own warns about precision
        parts[part] = value
    parts |= {name: denoiser, "scheduler": getattr(diffusers, scheduler)(**config)}
    pipe = cls(**parts)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": model.height, "width": model.width}
    return pipe, {**size, **published.call, **published.given(inputs), "output_type": "latent"}
