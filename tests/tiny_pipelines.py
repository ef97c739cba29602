"""Pipelines around tiny transformers with random weights, and the arguments of a call of each."""

from __future__ import annotations

from typing import Any

import diffusers
import torch


def _no_text(encoders: int) -> dict[str, None]:
    ends = ["", *(f"_{k}" for k in range(2, encoders + 1))]
    return dict.fromkeys(f"{part}{end}" for part in ("text_encoder", "tokenizer") for end in ends)


def tiny_unet(seed: int = 0, **config: Any) -> Any:
    """A UNet with attention that is exported in less than a second."""
    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=4,
        **config,
    )
    return unet.eval().requires_grad_(False)


def tiny_sd() -> Any:
    pipe = diffusers.StableDiffusionPipeline(
        unet=tiny_unet(),
        scheduler=diffusers.DDIMScheduler(),
        vae=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **_no_text(1),
    )
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    call = {
        f"{n}prompt_embeds": torch.randn(1, 8, 32, generator=generator) for n in ("", "negative_")
    }
    call["latents"] = torch.randn(1, 4, 8, 8, generator=generator)
    return pipe, call | {"height": 64, "width": 64, "num_inference_steps": 4}


def draw(pipe: Any, call: dict[str, Any], **options: Any) -> torch.Tensor:
    """The final latents of a call of a tiny pipeline, noise drawn with seed 2."""
    generator = torch.Generator().manual_seed(2)
    return pipe(**{"generator": generator, "output_type": "latent"} | call | options)[0]


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
