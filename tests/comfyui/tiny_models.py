"""ComfyUI's own models with tiny widths and random weights, and runs of its samplers on them."""

from __future__ import annotations

from typing import Any

import comfy.model_patcher
import comfy.sample
import comfy.supported_models
import torch

CPU = torch.device("cpu")
#: Another device than that to ComfyUI, as a GPU is, so that it loads models there.
LOADED = torch.device("cpu", 0)
#: Of a token, so many numbers come from the text.
CONTEXT = 24
#: Of SDXL: so many numbers come from the text, and as many as ComfyUI makes of sizes.
_POOLED = 16
_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "num_heads": 2,
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": CONTEXT,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "legacy": False,
    "dtype": torch.float32,
}
_FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": _POOLED,
    "context_in_dim": CONTEXT,
    "hidden_size": 32,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [4, 6, 6],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "dtype": torch.float32,
}


def _patcher(config: Any) -> Any:
    torch.manual_seed(0)
    model = config.get_model({}, "")
    for weight in model.diffusion_model.parameters():
        torch.nn.init.normal_(weight, std=0.08)
    return comfy.model_patcher.ModelPatcher(model, LOADED, CPU)


def sd15(**other: Any) -> Any:
    """A MODEL of SD 1.5's layout."""
    return _patcher(comfy.supported_models.SD15({**_UNET, **other}))


def sdxl() -> Any:
    """A MODEL of SDXL's layout."""
    other = {
        "use_linear_in_transformer": True,
        "num_classes": "sequential",
        "adm_in_channels": _POOLED + 6 * 256,
        "transformer_depth": [0, 2],
        "transformer_depth_output": [0, 0, 2, 2],
    }
    return _patcher(comfy.supported_models.SDXL({**_UNET, **other}))


def flux() -> Any:
    """A MODEL of FLUX's layout."""
    return _patcher(comfy.supported_models.Flux(dict(_FLUX)))


def sample(
    model: Any,
    sampler: str = "euler",
    *,
    steps: int = 6,
    cfg: float = 5.0,
    batch: int = 1,
    tokens: int = 7,
    scheduler: str = "normal",
    seed: int = 0,
    denoise: float = 1.0,
    more: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Latents that ComfyUI's sampler draws with random conditions; the positive one has so many
    tokens, the other one seven, and ``more`` goes into both."""
    random = torch.Generator().manual_seed(seed)
    channels = model.model.latent_format.latent_channels
    noise = torch.randn(batch, channels, 16, 16, generator=random)
    options = {"pooled_output": torch.randn(1, _POOLED, generator=random), **(more or {})}
    positive, negative = (
        [[torch.randn(1, count, CONTEXT, generator=random), dict(options)]] for count in (tokens, 7)
    )
    return comfy.sample.sample(
        *(model, noise, steps, cfg, sampler, scheduler, positive, negative),
        torch.zeros_like(noise),
        denoise=denoise,
        disable_pbar=True,
        seed=seed,
    )
