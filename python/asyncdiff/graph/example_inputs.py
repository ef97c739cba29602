"""A call of a published denoiser made up from its configuration: shapes only, random values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import InputError


class _Maker:
    """Makes tensors like the denoiser's weights: on their device, in their dtype."""

    def __init__(self, module: nn.Module) -> None:
        weight = next(module.parameters())
        self.options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}

    def __call__(self, *shape: int) -> torch.Tensor:
        if self.options["device"].type == "meta":
            return torch.empty(shape, **self.options)
        generator = torch.Generator(self.options["device"]).manual_seed(0)
        return torch.randn(shape, generator=generator, **self.options)

    def label(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=self.options["device"], dtype=torch.int64)

    def time(self, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.full(shape, 500, device=self.options["device"], dtype=dtype)


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
    configuration. ``batch`` 2 is one picture with guidance. Raises InputError for a class of
    denoiser that is not known here.
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
    return make(_Maker(module), config, batch, frames, h, w)


def _unet(make: _Maker, config: Any, batch: int, frames: int | None, h: int, w: int) -> Any:
    kwargs: dict[str, Any] = {
        "sample": make(batch, config.in_channels, h, w),
        "timestep": make.time(),
        "encoder_hidden_states": make(batch, 77, _first(config.cross_attention_dim)),
        "return_dict": False,
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        kwargs["added_cond_kwargs"] = {
            "text_embeds": make(batch, pooled),
            "time_ids": make(batch, 6),
        }
    return kwargs


def _video_unet(make: _Maker, config: Any, batch: int, frames: int | None, h: int, w: int) -> Any:
    return {
        "sample": make(batch, frames or config.num_frames, config.in_channels, h, w),
        "timestep": make.time(dtype=torch.float32),
        "encoder_hidden_states": make(batch, 1, _first(config.cross_attention_dim)),
        "added_time_ids": make(batch, 3),
        "return_dict": False,
    }


def _motion_unet(make: _Maker, config: Any, batch: int, frames: int | None, h: int, w: int) -> Any:
    count = frames or 16
    return {
        "sample": make(batch, config.in_channels, count, h, w),
        "timestep": make.time(),
        "encoder_hidden_states": make(batch * count, 77, _first(config.cross_attention_dim)),
        "return_dict": False,
    }


def _sd3(make: _Maker, config: Any, batch: int, frames: int | None, h: int, w: int) -> Any:
    return {
        "hidden_states": make(batch, config.in_channels, h, w),
        "timestep": make.time(batch, dtype=torch.float32),
        "encoder_hidden_states": make(batch, 77 + 256, config.joint_attention_dim),
        "pooled_projections": make(batch, config.pooled_projection_dim),
        "return_dict": False,
    }


def _dit(make: _Maker, config: Any, batch: int, frames: int | None, h: int, w: int) -> Any:
    return {
        "hidden_states": make(batch, config.in_channels, h, w),
        "timestep": make.time(batch),
        "class_labels": make.label(batch),
        "return_dict": False,
    }


def _flux(make: _Maker, config: Any, batch: int, frames: int | None, h: int, w: int) -> Any:
    # FLUX packs 2×2 latents into a token; its guidance is an input, so that there is no batch.
    tokens, text = (h // 2) * (w // 2), 512
    kwargs: dict[str, Any] = {
        "hidden_states": make(1, tokens, config.in_channels),
        "timestep": make(1),
        "encoder_hidden_states": make(1, text, config.joint_attention_dim),
        "pooled_projections": make(1, config.pooled_projection_dim),
        "img_ids": make(tokens, 3),
        "txt_ids": make(text, 3),
        "return_dict": False,
    }
    if config.guidance_embeds:
        kwargs["guidance"] = make(1).float()
    return kwargs


def _first(value: Any) -> int:
    return value[0] if isinstance(value, (list, tuple)) else value


_BY_CLASS: dict[str, Callable[..., dict[str, Any]]] = {
    "UNet2DConditionModel": _unet,
    "UNetSpatioTemporalConditionModel": _video_unet,
    "UNetMotionModel": _motion_unet,
    "DiTTransformer2DModel": _dit,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
}
