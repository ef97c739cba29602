"""The arithmetic of packed values in torch: what CPUs use, GPUs without Triton, and what the
kernels are compared with.

``value``, ``new``, ``last`` and ``older`` are flat and of one dtype, ``packed`` is flat uint8 as
:mod:`.codec` says. ``new`` may be ``older``.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from .codec import BLOCK, LARGEST, MOST, SMALLEST, codes_in, scales_in


def encode(
    value: torch.Tensor,
    last: torch.Tensor,
    older: torch.Tensor,
    new: torch.Tensor,
    packed: torch.Tensor,
    kind: str,
) -> None:
    """Write into ``packed`` how ``value`` differs from what its reader expects, and into ``new``
    what the reader will make of that."""
    expected = _expected(last, older)
    count = value.numel()
    finite = value.isfinite()
    difference = torch.where(finite, value.float() - expected, 0.0).clamp_(-MOST, MOST)
    blocks = pad(difference, (0, -count % BLOCK)).view(-1, BLOCK)
    top = blocks.abs().amax(1)
    scales = (top / LARGEST[kind]).masked_fill_(top < SMALLEST, 0).view(torch.int32)
    scales = (scales + 0xFFFF) >> 16  # up to the next bfloat16, so that no code is too large
    scales_in(packed, count).copy_(scales)
    steps = _steps(packed, count)
    scaled = torch.where(steps == 0, 0.0, blocks / steps)
    scaled = scaled.clamp(-LARGEST[kind], LARGEST[kind]).flatten()[:count]
    scaled = torch.where(finite, scaled, torch.nan)
    codes = codes_in(packed, count)
    if kind == "fp8":
        codes.view(torch.float8_e4m3fn).copy_(scaled)
    else:
        codes.view(torch.int8).copy_(scaled.round().nan_to_num_(-128.0))
    _rebuilt(packed, expected, new, kind)


def decode(
    packed: torch.Tensor,
    last: torch.Tensor,
    older: torch.Tensor,
    new: torch.Tensor,
    kind: str,
) -> None:
    """Write into ``new`` the value that was packed."""
    _rebuilt(packed, _expected(last, older), new, kind)


def _expected(last: torch.Tensor, older: torch.Tensor) -> torch.Tensor:
    """In float32; 0 where that is not finite. Without products, so that it is the same on every
    device."""
    before = last.float()
    expected = before + (before - older.float())
    return torch.where(expected.isfinite(), expected, 0.0)


def _rebuilt(packed: torch.Tensor, expected: torch.Tensor, new: torch.Tensor, kind: str) -> None:
    count = new.numel()
    codes = codes_in(packed, count)
    if kind == "fp8":
        values = codes.view(torch.float8_e4m3fn).float()
    else:
        integers = codes.view(torch.int8)
        values = integers.float().masked_fill_(integers == -128, torch.nan)
    blocks = pad(values, (0, -count % BLOCK)).view(-1, BLOCK)
    blocks = blocks * _steps(packed, count)
    largest = torch.finfo(new.dtype).max
    new.copy_((expected + blocks.flatten()[:count]).clamp_(-largest, largest))


def _steps(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The scales as a column of float32."""
    return (scales_in(packed, count).int() << 16).view(torch.float32)[:, None]
