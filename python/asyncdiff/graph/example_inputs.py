"""A call of a published denoiser made up from its configuration: shapes only, random values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import InputError


@dataclass(frozen=True)
class _Maker:
    """Makes tensors like the denoiser's weights: on their device, in their dtype. ``h`` and ``w``
    are the size of its latents."""

    like: torch.Tensor
    config: Any
    batch: int
    frames: int | None
    h: int
    w: int

    def __call__(self, *shape: int) -> torch.Tensor:
        # Not by a method of the weight: quantised ones have few. Nor in place: who looks whether a
        # tensor was written to finds what pipelines make, too.
        device, dtype = self.like.device, self.like.dtype
        if self.like.is_meta:
            return torch.empty(shape, device=device, dtype=dtype)
        generator = torch.Generator(device).manual_seed(0)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    def whole(self, value: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.full(shape, value, device=self.like.device, dtype=dtype)

    def text(self, samples: int, tokens: int) -> torch.Tensor:
        width = self.config.cross_attention_dim
        return self(samples, tokens, width[0] if isinstance(width, (list, tuple)) else width)


def example_inputs(
    module: nn.Module,
    *,
    height: int | None = None,
    width: int | None = None,
    scale: int = 8,
    frames: int | None = None,
    batch: int = 2,
) -> dict[str, Any]:
    """Keyword arguments of one call, as the denoiser's diffusers pipeline makes it.

    ``height`` and ``width`` are pixels and ``scale`` pixels a latent; default is the size in the
    configuration. ``batch`` 2 is one picture with guidance, where that is one call. Raises
    InputError for a class of denoiser that is not known here.
    """
    name = type(module).__name__
    make = _BY_CLASS.get(name)
    if make is None:
        raise InputError(
            f"no example inputs are known for {name} (there are {', '.join(_BY_CLASS)}): run the "
            "pipeline once instead and look at handle.partition, or pass example arguments to "
            "asyncdiff.AsyncDenoiser"
        )
    config: Any = module.config
    size = getattr(config, "sample_size", None) or 128
    default = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    h = height // scale if height else default[0]
    w = width // scale if width else default[1]
    weight = next(module.parameters()).detach()
    return make(_Maker(weight, config, batch, frames, h, w)) | {"return_dict": False}


def _unet(make: _Maker) -> dict[str, Any]:
    config = make.config
    kwargs: dict[str, Any] = {
        "sample": make(make.batch, config.in_channels, make.h, make.w),
        "timestep": make.whole(500),
        "encoder_hidden_states": make.text(make.batch, 77),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        kwargs["added_cond_kwargs"] = {
            "text_embeds": make(make.batch, pooled),
            "time_ids": make(make.batch, 6),
        }
    return kwargs


def _video_unet(make: _Maker) -> dict[str, Any]:
    frames = make.frames or make.config.num_frames
    return {
        "sample": make(make.batch, frames, make.config.in_channels, make.h, make.w),
        "timestep": make.whole(500, dtype=torch.float32),
        "encoder_hidden_states": make.text(make.batch, 1),
        "added_time_ids": make(make.batch, 3),
    }


def _motion_unet(make: _Maker) -> dict[str, Any]:
    frames = make.frames or 16
    return {
        "sample": make(make.batch, make.config.in_channels, frames, make.h, make.w),
        "timestep": make.whole(500),
        "encoder_hidden_states": make.text(make.batch * frames, 77),
    }


def _sd3(make: _Maker) -> dict[str, Any]:
    return {
        "hidden_states": make(make.batch, make.config.in_channels, make.h, make.w),
        "timestep": make.whole(500, make.batch, dtype=torch.float32),
        "encoder_hidden_states": make(make.batch, 77 + 256, make.config.joint_attention_dim),
        "pooled_projections": make(make.batch, make.config.pooled_projection_dim),
    }


def _dit(make: _Maker) -> dict[str, Any]:
    return {
        "hidden_states": make(make.batch, make.config.in_channels, make.h, make.w),
        "timestep": make.whole(500, make.batch),
        "class_labels": make.whole(0, make.batch),
    }


def _flux(make: _Maker) -> dict[str, Any]:
    # FLUX packs 2×2 latents into a token; its guidance is an input, so that there is no batch.
    tokens, text = (make.h // 2) * (make.w // 2), 512
    kwargs = {
        "hidden_states": make(1, tokens, make.config.in_channels),
        "timestep": make(1),
        "encoder_hidden_states": make(1, text, make.config.joint_attention_dim),
        "pooled_projections": make(1, make.config.pooled_projection_dim),
        "img_ids": make(tokens, 3),
        "txt_ids": make(text, 3),
    }
    return kwargs | ({"guidance": make(1).float()} if make.config.guidance_embeds else {})


def _wan(make: _Maker) -> dict[str, Any]:
    # Guidance is a second call. Four frames of the video are one of the latents, but for the first.
    frames = ((make.frames or 81) - 1) // 4 + 1
    return {
        "hidden_states": make(1, make.config.in_channels, frames, make.h, make.w),
        "timestep": make.whole(500, 1),
        "encoder_hidden_states": make(1, 512, make.config.text_dim),
    }


def _qwen(make: _Maker) -> dict[str, Any]:
    # Guidance is a second call. 2×2 latents are a token.
    h, w = make.h // 2, make.w // 2
    return {
        "hidden_states": make(1, h * w, make.config.in_channels),
        "timestep": make(1),
        "encoder_hidden_states": make(1, 128, make.config.joint_attention_dim),
        "img_shapes": [[(1, h, w)]],
    }


_BY_CLASS: dict[str, Callable[[_Maker], dict[str, Any]]] = {
    "UNet2DConditionModel": _unet,
    "UNetSpatioTemporalConditionModel": _video_unet,
    "UNetMotionModel": _motion_unet,
    "DiTTransformer2DModel": _dit,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "WanTransformer3DModel": _wan,
    "QwenImageTransformer2DModel": _qwen,
}
