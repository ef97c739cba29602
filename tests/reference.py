"""The reference cases: exact results of the published algorithm (see data/reference/README.md)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file
from tiny_pipelines import tiny_unet

FOLDER = Path(__file__).parent / "data" / "reference"
CASES: list[dict[str, Any]] = json.loads((FOLDER / "cases.json").read_text())
NAMES = [case["name"] for case in CASES]


def case(name: str) -> dict[str, Any]:
    """One case by name."""
    return next(c for c in CASES if c["name"] == name)


def _small(name: str, denoiser: str) -> dict[str, Any]:
    """A case with another denoiser, cut in two."""
    halves = [["conv_in", "down_blocks"], ["mid_block", "up_blocks", "conv_norm_out", "conv_out"]]
    sizes = {"denoiser": denoiser, "height": 64, "width": 64, "split": halves}
    return case(name) | {"name": f"small_{name}"} | sizes


#: Cases without results, for tests of what any denoiser has: exported in a fifth of the time.
SMALL, SMALL_XL = _small("sd21_ddim_n2s1w1", "small"), _small("sdxl_euler_n2s1w1", "small_xl")
_TEXT_AND_TIME = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}


@cache
def expected() -> dict[str, torch.Tensor]:
    """Final latents by case."""
    return load_file(FOLDER / "expected.safetensors")


def denoiser(name: str) -> diffusers.UNet2DConditionModel:
    """A tiny denoiser with its fixed weights, on the CPU in float32."""
    if name.startswith("small"):
        return tiny_unet(**(_TEXT_AND_TIME if name == "small_xl" else {}))
    config = json.loads((FOLDER / f"{name}.config.json").read_text())
    unet = diffusers.UNet2DConditionModel.from_config(config)
    unet.load_state_dict(load_file(FOLDER / f"{name}.weights.safetensors"))
    return unet.eval().requires_grad_(False)


def pipeline(spec: dict[str, Any], device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """The case's diffusers pipeline, without VAE, tokenizer and text encoders."""
    scheduler = getattr(diffusers, spec["scheduler"])(**spec["scheduler_config"])
    unet = denoiser(spec["denoiser"])
    parts: dict[str, Any] = {"vae": None, "text_encoder": None, "tokenizer": None}
    if spec["pipeline"] == "StableDiffusionXLPipeline":
        parts |= {
            "text_encoder_2": None,
            "tokenizer_2": None,
            "force_zeros_for_empty_prompt": False,
        }
        parts |= {"add_watermarker": False}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None}
        parts |= {"requires_safety_checker": False}
    pipe = getattr(diffusers, spec["pipeline"])(unet=unet, scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, dtype)


def inputs(spec: dict[str, Any], device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Keyword arguments of the case's pipeline call."""
    of = {"small": "sd_seed1", "small_xl": "sdxl_seed2"}.get(spec["denoiser"], spec["denoiser"])
    tensors = load_file(FOLDER / f"{of}.inputs.safetensors")
    if of != spec["denoiser"]:
        tensors["latents"] = tensors["latents"][..., ::2, ::2].contiguous()
    call: dict[str, Any] = {k: v.to(device, dtype) for k, v in tensors.items()}
    call |= {"num_inference_steps": spec["steps"], "guidance_scale": spec["guidance_scale"]}
    return call | {"height": spec["height"], "width": spec["width"], "output_type": "latent"}


def settings(spec: dict[str, Any]) -> dict[str, Any]:
    """The case as keyword arguments of ``asyncdiff.parallelize``."""
    out = {k: spec[k] for k in ("components", "stride", "warmup", "time_shift")}
    return out | {"split": spec.get("split", "auto")}


def run(pipe: Any, spec: dict[str, Any], **options: Any) -> torch.Tensor:
    """The final latents of the case on ``pipe``."""
    weight = next(pipe.unet.parameters())
    call = inputs(spec, str(pipe.unet.device), weight.dtype)
    return pipe(**call | options).images


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2 distance of ``a`` to ``b``."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm())
