"""Weights in eight bits, as the repository keeps them: of the shipped model, and of the yardsticks.

A matrix or a convolution is int8 with one float16 scale for each output channel (the largest
magnitude is 127); vectors are float16. The model that is shown and judged is the one that these
give.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_SCALE = ".scale"


def save(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write weights, by name, in eight bits: a safetensors file."""
    kept: dict[str, Tensor] = {}
    for name, w in weights.items():
        w = w.detach().float().cpu().contiguous()
        if w.dim() < 2:
            kept[name] = w.half()
            continue
        scale = (w.flatten(1).abs().amax(1) / 127).clamp(min=1e-7).half()
        steps = (w / scale.float().view(-1, *[1] * (w.dim() - 1))).round()
        kept[name] = steps.clamp(-127, 127).to(torch.int8)
        kept[name + _SCALE] = scale
    save_file(kept, path)


def load(path: Path) -> dict[str, Tensor]:
    """The weights that :func:`save` wrote, in float32, by name."""
    kept = load_file(path)
    out: dict[str, Tensor] = {}
    for name, w in kept.items():
        if name.endswith(_SCALE):
            continue
        out[name] = w.float()
        if name + _SCALE in kept:
            out[name] *= kept[name + _SCALE].float().view(-1, *[1] * (w.dim() - 1))
    return out
