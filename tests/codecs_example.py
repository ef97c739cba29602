"""What is packed in tests of compressed bundles: values, and what came before them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from asyncdiff.runtime.exchange.compression.codec import crossing_nbytes

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Whole blocks and programs of the kernels, and not.
SIZES = (4096, 8192, 4096 + 77, 3 * 2048 + 64)


class Example(NamedTuple):
    """A value, what its reader has had before, and room for codes and for what comes of them."""

    value: torch.Tensor
    last: torch.Tensor
    older: torch.Tensor
    new: torch.Tensor
    packed: torch.Tensor


def example(dtype: torch.dtype, count: int, device: Any = "cpu", seed: int = 0) -> Example:
    """A value that goes on about as before; blocks that do exactly, and large and small ones."""
    g = torch.Generator().manual_seed(seed)
    last, turn, noise = (torch.randn(count, generator=g) for _ in range(3))
    size = torch.logspace(-3, 2, count)
    older = last - 0.1 * turn
    value = last + 0.1 * turn + 0.02 * noise * size
    last, older, value = (x.to(dtype) for x in (last, older, value))
    value[256:512] = last[256:512] = older[256:512] = 0.5
    packed = torch.zeros(crossing_nbytes(dtype, count), dtype=torch.uint8)
    made = Example(value, last, older, torch.zeros_like(value), packed)
    return Example(*(x.to(device) for x in made))
