"""Which values of a bundle cross as codes, and how codes and scales lie in it.

What crosses of a value is by how much it differs from what its reader would have expected: a
straight line through the two values of that channel before it, as the reader has them. Sender and
reader keep these two, and compute them alike, bit for bit. So what the codes have lost of one value
is a part of the next difference, and errors do not add up.

The elements of a value, in the order of its memory, are taken in blocks of :data:`BLOCK`: channels
of a token or pixel, where channels lie innermost. A block has one scale, a bfloat16, and a byte an
element: an integer from -127 to 127, or a float8 (e4m3), times that scale. Codes have 7 bits, and
scales 8, so that their product is exact in float32, and no device can round it in its own way.

A value that is not finite crosses as NaN, by itself: it has no part in its block's scale. Nor does
it stay: where what is expected is not finite, 0 is expected instead. What is rebuilt stays within
the largest numbers of its type, past which float16 values would go where codes round up.
"""

from __future__ import annotations

import math

import torch
from torch import fx

import asyncdiff_core as core

from ....graph.capture import tensors_of

#: Elements that share a scale.
BLOCK = 64
#: By what codes are, the largest magnitude of one.
LARGEST = {"fp8": 448.0, "int8": 127.0}
#: Where a block differs by less, it counts as being as expected.
SMALLEST = 1e-30
#: By how much a block may differ, so that no product of a code and a scale is infinite.
MOST = torch.finfo(torch.float32).max / 2
#: Values with fewer elements cross as they are: a launch on either side costs more.
LEAST = 4096

_CODED = (torch.float16, torch.bfloat16, torch.float32)
#: Scales begin at a multiple of so many bytes.
_ALIGNED = 16


def is_coded(dtype: torch.dtype, numel: int) -> bool:
    """Whether a value of so many elements crosses as codes."""
    return dtype in _CODED and numel >= LEAST


def crossing_nbytes(dtype: torch.dtype, numel: int) -> int:
    """Bytes that cross of such a value, in a compressed bundle."""
    if not is_coded(dtype, numel):
        return numel * dtype.itemsize
    return start_of_scales(numel) + 2 * math.ceil(numel / BLOCK)


def crossing(node: fx.Node) -> int:
    """Bytes that cross of a node's value, in a compressed bundle."""
    return sum(crossing_nbytes(t.dtype, t.numel()) for t in tensors_of(node))


def start_of_scales(numel: int) -> int:
    """Bytes of the codes of so many elements, with the gap behind them."""
    return math.ceil(numel / _ALIGNED) * _ALIGNED


def codes_in(packed: torch.Tensor, numel: int) -> torch.Tensor:
    """The codes in a packed value (flat uint8), one a byte."""
    return packed[:numel]


def scales_in(packed: torch.Tensor, numel: int) -> torch.Tensor:
    """The scales in a packed value, one a block: the bits of a bfloat16."""
    return packed[start_of_scales(numel) :].view(torch.int16)


def packed_layout(layout: core.Layout) -> tuple[core.Layout, list[bool]]:
    """The layout of what crosses in place of a bundle laid out like this, and which of its values
    are packed there."""
    specs, coded = [], []
    for spec in layout.specs:
        numel, dtype = math.prod(spec.shape), getattr(torch, spec.dtype)
        coded.append(is_coded(dtype, numel))
        packed = core.TensorSpec("uint8", (crossing_nbytes(dtype, numel),))
        specs.append(packed if coded[-1] else spec)
    return core.Layout(specs), coded
