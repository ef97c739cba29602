"""The arithmetic of packed values as Triton kernels, one launch a value: see :mod:`.reference`.

A float8 is made and read with integers, so that GPUs that know none (before Ada) compute the same.
"""

# What Triton compiles is no Python to type checkers.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from .codec import BLOCK, LARGEST, MOST, SMALLEST, codes_in, scales_in

#: Blocks of elements of a program.
_ROWS = 32
#: Numbers of a larger magnitude are not finite.
_FINITE = tl.constexpr(torch.finfo(torch.float32).max)


def encode(
    value: torch.Tensor,
    last: torch.Tensor,
    older: torch.Tensor,
    new: torch.Tensor,
    packed: torch.Tensor,
    kind: str,
) -> None:
    """See :func:`.reference.encode`; on the current stream."""
    count = value.numel()
    codes, scales = codes_in(packed, count), scales_in(packed, count)
    _encode[(triton.cdiv(count, _ROWS * BLOCK),)](
        value, last, older, new, codes, scales, count,
        LARGEST[kind], SMALLEST, MOST, torch.finfo(new.dtype).max, kind == "fp8", BLOCK, _ROWS,
    )  # fmt: skip


def decode(
    packed: torch.Tensor,
    last: torch.Tensor,
    older: torch.Tensor,
    new: torch.Tensor,
    kind: str,
) -> None:
    """See :func:`.reference.decode`; on the current stream."""
    count = new.numel()
    codes, scales = codes_in(packed, count), scales_in(packed, count)
    _decode[(triton.cdiv(count, _ROWS * BLOCK),)](
        codes, scales, last, older, new, count,
        torch.finfo(new.dtype).max, kind == "fp8", BLOCK, _ROWS,
    )  # fmt: skip


@triton.jit
def _encode(
    value, last, older, new, codes, scales, count,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr, MOST: tl.constexpr, LIMIT: tl.constexpr,
    FLOAT8: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = at < count
    expected = _expected(last + at, older + at, inside)
    number = tl.load(value + at, mask=inside, other=0.0).to(tl.float32)
    finite = tl.abs(number) <= _FINITE
    difference = tl.where(finite, number - expected, 0.0)
    difference = tl.minimum(tl.maximum(difference, -MOST), MOST)
    top = tl.max(tl.abs(difference), axis=1)
    # Up to the next bfloat16, so that no code is too large.
    # Quotients are rounded as the reference's: Triton's own may be off by a digit.
    scale = tl.where(top < SMALLEST, 0.0, tl.div_rn(top, LARGEST))
    scale = scale.to(tl.int32, bitcast=True) + 0xFFFF >> 16
    tl.store(scales + rows, scale.to(tl.int16), mask=rows * BLOCK < count)
    step = (scale << 16).to(tl.float32, bitcast=True)[:, None]
    scaled = tl.where(step == 0.0, 0.0, tl.div_rn(difference, tl.where(step == 0.0, 1.0, step)))
    scaled = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST)
    if FLOAT8:
        code = tl.where(finite, _to_float8(scaled), 127)
    else:
        # Adding this rounds to the nearest integer, ties to even.
        whole = (scaled + 12582912.0) - 12582912.0
        code = tl.where(finite, whole.to(tl.int32), -128) & 255
    tl.store(codes + at, code.to(tl.uint8), mask=inside)
    rebuilt = _rebuilt(expected, code, step, LIMIT, FLOAT8).to(new.dtype.element_ty)
    tl.store(new + at, rebuilt, mask=inside)


@triton.jit
def _decode(
    codes, scales, last, older, new, count,
    LIMIT: tl.constexpr, FLOAT8: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = at < count
    expected = _expected(last + at, older + at, inside)
    scale = tl.load(scales + rows, mask=rows * BLOCK < count, other=0).to(tl.int32)
    step = (scale << 16).to(tl.float32, bitcast=True)[:, None]
    code = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    rebuilt = _rebuilt(expected, code, step, LIMIT, FLOAT8).to(new.dtype.element_ty)
    tl.store(new + at, rebuilt, mask=inside)


@triton.jit
def _expected(last, older, inside):
    """What a reader expects, in float32; 0 where that is not finite."""
    before = tl.load(last, mask=inside, other=0.0).to(tl.float32)
    earlier = tl.load(older, mask=inside, other=0.0).to(tl.float32)
    expected = before + (before - earlier)
    return tl.where(tl.abs(expected) <= _FINITE, expected, 0.0)


@triton.jit
def _rebuilt(expected, code, step, LIMIT: tl.constexpr, FLOAT8: tl.constexpr):
    """What a reader makes of codes (0 to 255, int32), in float32, from -LIMIT to LIMIT or NaN."""
    if FLOAT8:
        number = _of_float8(code)
    else:
        signed = tl.where(code > 127, code - 256, code)
        number = tl.where(signed == -128, float("nan"), signed.to(tl.float32))
    rebuilt = expected + number * step
    # Not by minimum and maximum, which make a number of NaN.
    return tl.where(rebuilt > LIMIT, LIMIT, tl.where(rebuilt < -LIMIT, -LIMIT, rebuilt))


@triton.jit
def _to_float8(x):
    """The e4m3 codes nearest to numbers from -448 to 448, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 128
    size = bits & 0x7FFFFFFF
    # From 2^-6 on: three bits of the fraction, and the exponent from 2^-7 instead of 2^-127.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
    # Below: multiples of 2^-9.
    small = ((tl.abs(x) * 512.0 + 12582912.0) - 12582912.0).to(tl.int32)
    return sign | tl.where(size < 0x3C800000, small, normal)


@triton.jit
def _of_float8(code):
    """The numbers that e4m3 codes (int32) stand for."""
    size = code & 127
    normal = ((size + 960) << 20).to(tl.float32, bitcast=True)
    number = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
    number = tl.where(size == 127, float("nan"), number)
    return tl.where(code > 127, -number, number)
