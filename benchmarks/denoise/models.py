"""The published denoisers at their published sizes, from their published configurations.

Weights are random: speed does not depend on them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from denoise.loop import Loop
from denoise.quantised import KINDS, quantise


@dataclass(frozen=True)
class Published:
    """A denoiser's diffusers class and configuration, and the picture that it is used for.

    ``timestep_divisor``: what its pipeline divides the scheduler's timestep by. ``weights``: how
    they are quantised (:mod:`denoise.quantised`), if they are. ``branches``: how often its pipeline
    calls it in a step.
    """

    key: str
    title: str
    cls: str
    config: dict[str, Any]
    height: int
    width: int
    frames: int | None = None
    timestep_divisor: float = 1.0
    weights: str | None = None
    branches: int = 1

    def with_weights(self, kind: str) -> Published:
        """The same with quantised weights."""
        key, title = f"{self.key}-{kind.replace(' ', '-')}", f"{self.title}, {kind}"
        return replace(self, key=key, title=title, weights=kind)

    def build(self, device: str, dtype: Any) -> Any:
        """The denoiser with random weights, in eval mode (on "meta": without memory)."""
        import diffusers
        import torch

        with torch.device(device):
            torch.manual_seed(0)
            module = getattr(diffusers, self.cls)(**self.config)
        # diffusers' own .to() warns about precision that random weights do not have.
        torch.nn.Module.to(module, device, dtype)
        module.eval().requires_grad_(False)
        if self.weights is not None:
            quantise(module, self.weights)
        return module

    def inputs(self, module: Any) -> dict[str, Any]:
        """Keyword arguments of one call at the published size."""
        from asyncdiff.graph.example_inputs import example_inputs

        return example_inputs(module, height=self.height, width=self.width, frames=self.frames)

    def loop(self, inputs: dict[str, Any], steps: int) -> Loop:
        """A generation of so many steps from such keyword arguments."""
        divisor, branches = self.timestep_divisor, self.branches
        return Loop(inputs, steps, timestep_divisor=divisor, branches=branches)


_SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
_SD21: dict[str, Any] = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
_SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SVD: dict[str, Any] = {
    "sample_size": 96,
    "in_channels": 8,
    "out_channels": 4,
    "num_attention_heads": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "num_frames": 25,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 768,
}
_ANIMATEDIFF: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "num_attention_heads": 8,
    "motion_num_attention_heads": 8,
    "motion_max_seq_length": 32,
    "use_motion_mid_block": False,
}
_SD3: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
_FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}

_WAN: dict[str, Any] = {
    "num_attention_heads": 12,
    "ffn_dim": 8960,
    "num_layers": 30,
}

_TINY_WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "ffn_dim": 32,
    "num_layers": 4,
}
_TINY_QWEN: dict[str, Any] = {
    "num_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}
_TINY_SDXL: dict[str, Any] = {
    **_SDXL,
    "sample_size": 16,
    "block_out_channels": (32, 64, 128),
    "attention_head_dim": [2, 4, 8],
    "transformer_layers_per_block": [1, 1, 4],
    "cross_attention_dim": 32,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
_TINY_FLUX: dict[str, Any] = {
    **_FLUX,
    "in_channels": 16,
    "num_layers": 4,
    "num_single_layers": 8,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}
_TINY: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def _qwen(key: str, title: str, config: dict[str, Any], size: int) -> Published:
    cls = "QwenImageTransformer2DModel"
    return Published(key, title, cls, config, size, size, timestep_divisor=1000.0, branches=2)


MODELS = {
    m.key: m
    for m in (
        Published("sd15", "SD 1.5, 512²", "UNet2DConditionModel", _SD15, 512, 512),
        Published("sd21", "SD 2.1, 768²", "UNet2DConditionModel", _SD21, 768, 768),
        Published("sdxl", "SDXL, 1024²", "UNet2DConditionModel", _SDXL, 1024, 1024),
        Published(
            "svd",
            "SVD-XT, 25 frames 576×1024",
            "UNetSpatioTemporalConditionModel",
            _SVD,
            576,
            1024,
            25,
        ),
        Published(
            "animatediff",
            "AnimateDiff, 16 frames 512²",
            "UNetMotionModel",
            _ANIMATEDIFF,
            512,
            512,
            16,
        ),
        Published("sd3", "SD3 medium, 1024²", "SD3Transformer2DModel", _SD3, 1024, 1024),
        Published(
            "flux",
            "FLUX.1-dev, 1024²",
            "FluxTransformer2DModel",
            _FLUX,
            1024,
            1024,
            timestep_divisor=1000.0,
        ),
        Published(
            "wan",
            "Wan 2.1 1.3B, 81 frames 480×832",
            "WanTransformer3DModel",
            _WAN,
            480,
            832,
            81,
            branches=2,
        ),
        _qwen("qwen", "Qwen-Image, 1024²", {}, 1024),
        _qwen("qwen-half", "Qwen-Image, 30 of 60 layers, 1024²", {"num_layers": 30}, 1024),
    )
}
#: Nobody's.
TINY = Published("tiny", "a tiny UNet, 64²", "UNet2DConditionModel", _TINY, 64, 64)

#: With quantised weights.
QUANTISED = {m.key: m for m in (MODELS["flux"].with_weights(kind) for kind in KINDS)}
#: To try the benchmark with.
TRIES = {
    m.key: m
    for m in (
        TINY,
        TINY.with_weights("float8"),
        Published(
            "tiny-wan",
            "a tiny Wan, 9 frames 64²",
            "WanTransformer3DModel",
            _TINY_WAN,
            64,
            64,
            9,
            branches=2,
        ),
        _qwen("tiny-qwen", "a tiny Qwen-Image, 64²", _TINY_QWEN, 64),
        Published(
            "tiny-sdxl", "SDXL's structure, 128²", "UNet2DConditionModel", _TINY_SDXL, 128, 128
        ),
        Published(
            "tiny-flux",
            "FLUX's structure, 128²",
            "FluxTransformer2DModel",
            _TINY_FLUX,
            128,
            128,
            timestep_divisor=1000.0,
        ),
    )
}
