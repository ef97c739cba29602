"""Denoisers with quantised weights, by torchao.

Torchao is one small wheel, without dependencies and the same for all versions of Python:

    pip download --no-deps --only-binary=:all: --platform manylinux_2_28_x86_64 torchao
    pip install --no-deps torchao-*.whl  # where there is no network
"""

from __future__ import annotations

import gc

import torch
from torch import nn

#: How weights may be quantised: in float8, by rows; and activations, too, in each call.
KINDS = ("float8", "float8 dynamic")


def quantise(module: nn.Module, kind: str) -> None:
    """Quantise the weights of a denoiser's linear layers, one after another, where they lie; there
    is nothing of what they were afterwards."""
    try:
        from torchao import quantization as ao
    except ImportError as e:
        raise SystemExit(f"quantised weights need torchao: {__doc__}") from e
    rows = ao.PerRow()
    if kind == "float8 dynamic":
        if any(w.dtype is not torch.bfloat16 for w in module.parameters()):
            raise SystemExit("float8 by rows is multiplied in bfloat16 only: --dtype bfloat16")
        config = ao.Float8DynamicActivationFloat8WeightConfig(granularity=rows)
    else:
        config = ao.Float8WeightOnlyConfig()
    ao.quantize_(module, config, filter_fn=_fits)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _fits(module: nn.Module, _: str) -> bool:
    """Whether the matrix product in float8 takes a layer: its sides are multiples of 16."""
    if not isinstance(module, nn.Linear):
        return False
    return module.in_features % 16 == 0 and module.out_features % 16 == 0
