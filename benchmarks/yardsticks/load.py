"""Yardstick models as pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import nn

from asyncdiff.demo import weights as eight_bit
from yardsticks.models import SCHEDULE, make
from yardsticks.pipeline import TransformerPipeline, UNetPipeline

HERE = Path(__file__).parent
#: Samplers of each kind; the first is the one that it is shown with.
SAMPLERS = {"unet": ("ddim", "dpm", "euler"), "transformer": ("flow",)}


def scheduler(name: str) -> Any:
    """A sampler by name."""
    if name == "ddim":
        return DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False)
    if name == "dpm":
        return DPMSolverMultistepScheduler(**SCHEDULE)
    if name == "euler":
        return EulerDiscreteScheduler(**SCHEDULE)
    return FlowMatchEulerDiscreteScheduler()


def pipeline(kind: str, model: nn.Module, sampler: str | None = None) -> Any:
    """A pipeline of this trained model."""
    sample = scheduler(sampler or SAMPLERS[kind][0])
    model.eval().requires_grad_(False)
    if kind == "unet":
        pipe: Any = UNetPipeline(model.denoiser, sample, model.class_encoder)
    else:
        pipe = TransformerPipeline(model.denoiser, sample)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(
    kind: str, device: str = "cpu", sampler: str | None = None, weights: Path | None = None
) -> Any:
    """The pipeline of a yardstick ("unet" or "transformer"), float32, on ``device``; of other
    ``weights`` than those in the repository, where given."""
    model = make(kind)
    model.load_state_dict(eight_bit.load(weights or HERE / f"{kind}.safetensors"))
    return pipeline(kind, model, sampler).to(torch.device(device))
