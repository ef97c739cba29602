"""Pipelines around tiny transformers with random weights, and the arguments of a call of each."""

from __future__ import annotations

from typing import Any

import diffusers
import torch


def _no_text(encoders: int) -> dict[str, None]:
    ends = ["", *(f"_{k}" for k in range(2, encoders + 1))]
    return dict.fromkeys(f"{part}{end}" for part in ("text_encoder", "tokenizer") for end in ends)


def tiny_flux() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    pipe = diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        **_no_text(2),
    )
    call = {
        "prompt_embeds": torch.randn(1, 8, 32),
        "pooled_prompt_embeds": torch.randn(1, 24),
        "height": 64,
        "width": 64,
    }
    return pipe, call


def tiny_sd3_transformer() -> Any:
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=24,
        pos_embed_max_size=8,
    ).eval()


def tiny_sd3() -> Any:
    transformer = tiny_sd3_transformer()
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        **_no_text(3),
    )
    call = {f"{n}prompt_embeds": torch.randn(1, 8, 32) for n in ("", "negative_")}
    call |= {f"{n}pooled_prompt_embeds": torch.randn(1, 24) for n in ("", "negative_")}
    return pipe, call | {"height": 64, "width": 64}
