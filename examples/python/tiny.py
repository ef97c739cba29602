"""Diffusers pipelines with tiny random weights, so that the examples run anywhere in seconds.

What they draw is noise. With a model of your own every example reads the same. Make the pipeline by
``….from_pretrained("path/or/id", dtype=torch.float16).to("cuda")``, write prompts in the place of
embeddings, and ``["cuda:0", "cuda:1"]`` in the place of two shares of the CPU.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch

#: Width of the text embeddings.
TEXT = 32
#: What every tiny UNet of Stable Diffusion's kind is made of.
_BLOCKS: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": TEXT,
    "attention_head_dim": 8,
}
_DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")


def unet() -> diffusers.UNet2DConditionModel:
    """A UNet of Stable Diffusion's structure with a few hundred thousand weights."""
    torch.manual_seed(0)
    made = diffusers.UNet2DConditionModel(
        sample_size=8,
        down_block_types=_DOWN,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **_BLOCKS,
    )
    return made.eval()


def controlnet() -> diffusers.ControlNetModel:
    """A ControlNet that fits :func:`unet`, for pictures of 16 x 16 pixels."""
    torch.manual_seed(1)
    made = diffusers.ControlNetModel(
        down_block_types=_DOWN, conditioning_embedding_out_channels=(8, 16), **_BLOCKS
    )
    for layer in [*made.controlnet_down_blocks, made.controlnet_mid_block]:
        torch.nn.init.normal_(layer.weight, std=0.1)  # they begin as zeros, which steer nothing
    return made.eval()


def vae() -> diffusers.AutoencoderKL:
    """An autoencoder that halves the sides of a picture."""
    torch.manual_seed(2)
    made = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    return made.eval()


def parts() -> dict[str, Any]:
    """The parts that Stable Diffusion's pipelines share; prompts are given as embeddings."""
    return {
        "unet": unet(),
        "vae": vae(),
        "scheduler": diffusers.DDIMScheduler(
            clip_sample=False, steps_offset=1, beta_schedule="scaled_linear"
        ),
        "text_encoder": None,
        "tokenizer": None,
    }


def unchecked() -> dict[str, Any]:
    """The arguments by which Stable Diffusion's pipelines do without a safety checker."""
    return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def text(seed: int = 0) -> dict[str, torch.Tensor]:
    """Embeddings in the place of ``prompt`` and ``negative_prompt``."""
    generator = torch.Generator().manual_seed(seed)
    names = ("prompt_embeds", "negative_prompt_embeds")
    return {name: torch.randn(1, 7, TEXT, generator=generator) for name in names}
