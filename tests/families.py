"""A tiny pipeline of each family of diffusers, with random weights, called with prompts that are
encoded already: nothing is downloaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from PIL import Image
from tiny_pipelines import tiny_flux, tiny_sd, tiny_sd3, tiny_unet

#: A pipeline, and the arguments of a call of it.
Family = tuple[Any, dict[str, Any]]
#: Steps of a call.
STEPS = 3
#: Where an empty one is the default.
NO_TEXT: dict[str, Any] = {"negative_prompt": None}
DDIM: dict[str, Any] = {"scheduler": "DDIMScheduler"}


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.int64)


def embeds(*shape: int, negative: bool = True, **others: Any) -> dict[str, Any]:
    """Prompts of these shapes, one to guide away from included."""
    call = {"prompt_embeds": randn(*shape)} | others
    if negative:
        call |= {f"negative_{n}": x if "mask" in n else -0.5 * x for n, x in call.items()}
    return call


def masked(*shape: int) -> dict[str, Any]:
    return embeds(*shape, prompt_attention_mask=ones(*shape[:2]))


def size(height: int, frames: int = 0) -> dict[str, Any]:
    return {"height": height, "width": height} | ({"num_frames": frames} if frames else {})


def build(kind: str, scheduler: str, **parts: Any) -> Any:
    """A pipeline of this kind; what it takes and is not given is None."""
    made = getattr(diffusers, kind)
    named = inspect.signature(made.__init__).parameters
    given = dict.fromkeys(n for n, p in named.items() if p.default is p.empty and n != "self")
    given["scheduler"] = getattr(diffusers, scheduler)()
    pipe = made(**given | parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def model(kind: str, **config: Any) -> Any:
    torch.manual_seed(0)
    return _without_noughts(getattr(diffusers, kind)(**config).eval().requires_grad_(False))


def _without_noughts(made: Any) -> Any:
    """Some weights begin at nought, so that blocks do nothing."""
    for weight in made.parameters():
        if not weight.any():
            weight.data = 0.1 * torch.randn_like(weight)
    return made


def transformer(
    pipeline: str, kind: str, config: dict[str, Any], call: dict[str, Any], **parts: Any
) -> Callable[[], Family]:
    scheduler = parts.pop("scheduler", "FlowMatchEulerDiscreteScheduler")

    def made() -> Family:
        return build(pipeline, scheduler, transformer=model(kind, **config), **parts), call

    return made


def _xl() -> Any:
    return tiny_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )


def sd21() -> Family:
    pipe, call = tiny_sd()
    unet = tiny_unet(use_linear_projection=True)
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction")
    parts = pipe.components | {"unet": unet, "scheduler": scheduler}
    return diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False), call


def sdxl() -> Family:
    parts = {"unet": _xl(), "force_zeros_for_empty_prompt": False, "add_watermarker": False}
    pipe = build("StableDiffusionXLPipeline", "EulerDiscreteScheduler", **parts)
    pooled = {"pooled_prompt_embeds": randn(1, 16)}
    return pipe, embeds(1, 8, 32, **pooled) | size(64)


def controlnet() -> Family:
    pipe, call = tiny_sd()
    net = _without_noughts(diffusers.ControlNetModel.from_unet(pipe.unet).eval())
    kind = diffusers.StableDiffusionControlNetPipeline
    pipe = kind(**pipe.components, controlnet=net, requires_safety_checker=False)
    return pipe, call | {"image": randn(1, 3, 64, 64).sigmoid()}


def animatediff() -> Family:
    unet = model(
        "UNetMotionModel",
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        cross_attention_dim=32,
        num_attention_heads=4,
        motion_num_attention_heads=4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    pipe = build("AnimateDiffPipeline", "DDIMScheduler", unet=unet)
    return pipe, embeds(1, 8, 32) | size(64, 3)


def kandinsky22() -> Family:
    unet = model(
        "UNet2DConditionModel",
        sample_size=8,
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 64),
        layers_per_block=1,
        encoder_hid_dim=32,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=16,
        attention_head_dim=8,
        class_embed_type=None,
        resnet_time_scale_shift="scale_shift",
    )
    movq = model(
        "VQModel",
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    pipe = build("KandinskyV22Pipeline", "DDIMScheduler", unet=unet, movq=movq)
    return pipe, {"image_embeds": randn(1, 32), "negative_image_embeds": -randn(1, 32)} | size(64)


_VAE = model(
    "AutoencoderKL",
    block_out_channels=(8,),
    down_block_types=("DownEncoderBlock2D",),
    up_block_types=("UpDecoderBlock2D",),
    norm_num_groups=4,
)


def flux2_klein_kv() -> Family:
    """The first step returns keys and values of the given picture, which later ones are given."""
    vae = model(
        "AutoencoderKLFlux2",
        block_out_channels=(4,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        latent_channels=4,
        norm_num_groups=1,
    )
    denoiser = model("Flux2Transformer2DModel", **_FLUX2, guidance_embeds=False)
    scheduler = "FlowMatchEulerDiscreteScheduler"
    pipe = build("Flux2KleinKVPipeline", scheduler, vae=vae, transformer=denoiser)
    image = {"image": Image.new("RGB", (64, 64), (90, 40, 200)), "num_inference_steps": 4}
    return pipe, embeds(1, 8, 32, negative=False) | image | size(64)


_FLUX2 = {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "timestep_guidance_channels": 16,
    "axes_dims_rope": (4, 4, 4, 4),
}  # fmt: skip
_ROPE = {"axes_dims_rope": (4, 4, 8), "attention_head_dim": 16, "num_attention_heads": 2}
_PIXART = {
    "sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 8,
    "num_attention_heads": 2, "caption_channels": 32, "in_channels": 4, "cross_attention_dim": 16,
    "out_channels": 8, "norm_type": "ada_norm_single", "use_additional_conditions": False,
}  # fmt: skip
_WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16,
    "out_channels": 16, "text_dim": 32, "freq_dim": 32, "ffn_dim": 32, "num_layers": 2,
    "rope_max_seq_len": 32,
}  # fmt: skip


FAMILIES: dict[str, Callable[[], Family]] = {
    "SD 1.5": tiny_sd,
    "SD 2.1": sd21,
    "SDXL": sdxl,
    "ControlNet": controlnet,
    "AnimateDiff": animatediff,
    "SD3": tiny_sd3,
    "FLUX": tiny_flux,
    "Kandinsky 2.2": kandinsky22,
    "FLUX.2": transformer(
        "Flux2Pipeline",
        "Flux2Transformer2DModel",
        _FLUX2,
        embeds(1, 8, 32, negative=False) | size(64),
    ),
    "FLUX.2 Klein KV": flux2_klein_kv,
    "Wan 2.1": transformer(
        "WanPipeline", "WanTransformer3DModel", _WAN, embeds(1, 8, 32) | size(16, 5)
    ),
    "SkyReels V2": transformer(
        "SkyReelsV2Pipeline", "SkyReelsV2Transformer3DModel", _WAN | {"inject_sample_info": False},
        embeds(1, 8, 32) | size(16, 5), scheduler="UniPCMultistepScheduler",
    ),
    "Qwen-Image": transformer(
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        {"in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 32, **_ROPE},
        {"prompt_embeds": randn(1, 8, 32), "prompt_embeds_mask": ones(1, 8),
         "negative_prompt_embeds": -randn(1, 5, 32), "negative_prompt_embeds_mask": ones(1, 5)}
        | size(64) | {"true_cfg_scale": 3.0},
    ),
    "Chroma": transformer(
        "ChromaPipeline",
        "ChromaTransformer2DModel",
        {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 32,
         "approximator_hidden_dim": 16, "approximator_layers": 1, "approximator_num_channels": 16,
         **_ROPE},
        embeds(1, 8, 32, prompt_attention_mask=torch.ones(1, 8)) | size(64),
    ),
    "CogView4": transformer(
        "CogView4Pipeline",
        "CogView4Transformer2DModel",
        {"patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
         "num_attention_heads": 2, "out_channels": 4, "text_embed_dim": 32, "time_embed_dim": 8,
         "condition_dim": 4},
        embeds(1, 8, 32) | size(64),
    ),
    "CogView3": transformer(
        "CogView3PlusPipeline",
        "CogView3PlusTransformer2DModel",
        {"patch_size": 2, "in_channels": 4, "num_layers": 1, "attention_head_dim": 8,
         "num_attention_heads": 2, "out_channels": 4, "text_embed_dim": 32, "time_embed_dim": 8,
         "condition_dim": 2, "pos_embed_max_size": 8, "sample_size": 8},
        embeds(1, 8, 32) | size(64), scheduler="CogVideoXDDIMScheduler",
    ),
    "CogVideoX": transformer(
        "CogVideoXPipeline",
        "CogVideoXTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
         "time_embed_dim": 8, "text_embed_dim": 32, "num_layers": 2, "sample_width": 2,
         "sample_height": 2, "sample_frames": 9, "max_text_seq_length": 8},
        embeds(1, 8, 32) | size(16, 9), scheduler="CogVideoXDDIMScheduler",
    ),
    "Hunyuan Video": transformer(
        "HunyuanVideoPipeline",
        "HunyuanVideoTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10,
         "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1,
         "patch_size_t": 1, "guidance_embeds": True, "text_embed_dim": 16,
         "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4)},
        embeds(1, 8, 16, negative=False) | size(16, 9)
        | {"pooled_prompt_embeds": randn(1, 8), "prompt_attention_mask": ones(1, 8)},
    ),
    "LTX": transformer(
        "LTXPipeline",
        "LTXVideoTransformer3DModel",
        {"in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 8,
         "cross_attention_dim": 16, "num_layers": 2, "caption_channels": 32},
        masked(1, 8, 32) | size(32, 9),
    ),
    "Mochi": transformer(
        "MochiPipeline",
        "MochiTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
         "pooled_projection_dim": 16, "in_channels": 12, "text_embed_dim": 32, "time_embed_dim": 4,
         "max_sequence_length": 8},
        masked(1, 8, 32) | size(16, 7),
    ),
    "Lumina 2": transformer(
        "Lumina2Pipeline",
        "Lumina2Transformer2DModel",
        {"sample_size": 4, "in_channels": 4, "hidden_size": 16, "num_layers": 1,
         "num_refiner_layers": 1, "num_attention_heads": 1, "num_kv_heads": 1, "multiple_of": 16,
         "axes_dim_rope": (8, 4, 4), "axes_lens": (16, 16, 16), "cap_feat_dim": 8},
        {"prompt_embeds": randn(1, 8, 8), "prompt_attention_mask": ones(1, 8),
         "negative_prompt_embeds": -randn(1, 8, 8), "negative_prompt_attention_mask": ones(1, 8)}
        | size(32),
    ),
    "Sana": transformer(
        "SanaPipeline",
        "SanaTransformer2DModel",
        {"patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 1,
         "num_attention_heads": 2, "attention_head_dim": 4, "num_cross_attention_heads": 2,
         "cross_attention_head_dim": 4, "cross_attention_dim": 8, "caption_channels": 8,
         "sample_size": 8},
        masked(1, 8, 8) | size(64) | NO_TEXT | {"use_resolution_binning": False},
    ),
    "PixArt": transformer(
        "PixArtSigmaPipeline", "PixArtTransformer2DModel", _PIXART,
        masked(1, 8, 32) | size(64) | NO_TEXT | {"use_resolution_binning": False}, **DDIM,
    ),
    "AuraFlow": transformer(
        "AuraFlowPipeline",
        "AuraFlowTransformer2DModel",
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1,
         "num_single_dit_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
         "caption_projection_dim": 16, "joint_attention_dim": 32, "out_channels": 4,
         "pos_embed_max_size": 64},
        masked(1, 8, 32) | size(64),
    ),
    "DiT": transformer(
        "DiTPipeline",
        "DiTTransformer2DModel",
        {"sample_size": 8, "num_layers": 2, "patch_size": 4, "attention_head_dim": 8,
         "num_attention_heads": 2, "in_channels": 4, "out_channels": 8,
         "num_embeds_ada_norm": 1000},
        {"class_labels": [3], "output_type": "np"}, **DDIM, vae=_VAE,
    ),
    "Z-Image": transformer(
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        {"all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 16, "dim": 32,
         "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16,
         "axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32]},
        {"prompt_embeds": [randn(8, 16)], "negative_prompt_embeds": [randn(5, 16)]} | size(64),
    ),
    "Ovis": transformer(
        "OvisImagePipeline",
        "OvisImageTransformer2DModel",
        {"in_channels": 16, "out_channels": 16, "num_layers": 1, "num_single_layers": 1,
         "joint_attention_dim": 32, **_ROPE},
        embeds(1, 8, 32) | size(64) | NO_TEXT,
    ),
    "Allegro": transformer(
        "AllegroPipeline",
        "AllegroTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
         "num_layers": 2, "cross_attention_dim": 24, "sample_width": 8, "sample_height": 8,
         "sample_frames": 8, "caption_channels": 24},
        masked(1, 8, 24) | size(16, 8) | NO_TEXT, **DDIM,
    ),
    "Latte": transformer(
        "LattePipeline",
        "LatteTransformer3DModel",
        {"sample_size": 8, "num_layers": 1, "patch_size": 2, "attention_head_dim": 8,
         "num_attention_heads": 2, "caption_channels": 32, "in_channels": 4,
         "cross_attention_dim": 16, "out_channels": 8, "num_embeds_ada_norm": 1000,
         "norm_type": "ada_norm_single"},
        embeds(1, 8, 32) | size(64) | NO_TEXT | {"video_length": 1, "mask_feature": False}, **DDIM,
    ),
    "Kandinsky 5": transformer(
        "Kandinsky5T2VPipeline",
        "Kandinsky5Transformer3DModel",
        {"in_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 8,
         "out_visual_dim": 4, "patch_size": (1, 2, 2), "model_dim": 16, "ff_dim": 32,
         "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (4, 2, 2),
         "visual_cond": False},
        {"prompt_embeds_qwen": randn(1, 8, 16), "prompt_embeds_clip": randn(1, 8),
         "prompt_cu_seqlens": torch.tensor([0, 8], dtype=torch.int32),
         "negative_prompt_embeds_qwen": -randn(1, 8, 16),
         "negative_prompt_embeds_clip": -randn(1, 8),
         "negative_prompt_cu_seqlens": torch.tensor([0, 8], dtype=torch.int32)} | size(16, 5),
    ),
}  # fmt: skip
