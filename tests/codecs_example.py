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


#: The step in which values of :func:`wild` have elements that are not finite, and which ones.
BAD_STEP, BAD = 2, {70: torch.nan, 300: torch.inf, 500: -torch.inf}


def wild(dtype: torch.dtype, count: int, device: Any = "cpu", steps: int = 8) -> list[torch.Tensor]:
    """Values that go on in no way, up to the largest numbers; in one step some are not finite."""
    g = torch.Generator().manual_seed(0)
    largest = torch.finfo(dtype).max
    values = []
    for _ in range(steps):
        made = torch.randn(count, generator=g, dtype=torch.float64) * 0.275 * largest
        values.append(made.clamp(-largest, largest).to(dtype))
    for index, bad in BAD.items():
        values[BAD_STEP][index] = bad
    return [v.to(device) for v in values]


class Arrived(NamedTuple):
    """What crossed of a value, and what its reader made of it."""

    packed: torch.Tensor
    value: torch.Tensor


def sent(codec: Any, values: list[torch.Tensor], kind: str) -> list[Arrived]:
    """What arrives of values that follow each other. Raises AssertionError where the ends differ.

    A sender and a reader keep two slots each, in which nothing was before.
    """
    sender, reader = ([torch.zeros_like(values[0]) for _ in range(2)] for _ in range(2))
    count = values[0].numel()
    nbytes = crossing_nbytes(values[0].dtype, count)
    arrived = []
    for step, value in enumerate(values):
        new, last = step % 2, 1 - step % 2
        packed = torch.zeros(nbytes, dtype=torch.uint8, device=value.device)
        codec.encode(value, sender[last], sender[new], sender[new], packed, kind)
        codec.decode(packed, reader[last], reader[new], reader[new], kind)
        same(reader[new], sender[new])
        arrived.append(Arrived(packed.cpu(), reader[new].to("cpu", copy=True)))
    return arrived


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    """Raise AssertionError where the bits of numbers differ, or only one of two is NaN."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def check_wild(arrived: list[Arrived]) -> None:
    """Raise AssertionError where more is not finite than what was sent so, or after that step."""
    for step, (_, value) in enumerate(arrived):
        wrong = set((~value.isfinite()).nonzero().flatten().tolist())
        assert wrong == (set(BAD) if step == BAD_STEP else set()), (step, len(wrong))
