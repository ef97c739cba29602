"""Triton kernels of the sampler's update. :mod:`asyncdiff.update` says what they compute.

Triton's interpreter (``TRITON_INTERPRET=1`` before this module is imported) runs them on the CPU.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

#: Predictions that one launch takes; more are taken by several launches.
MOST = 4
#: Elements (of 8 bytes, mostly) that one program of the clock copies.
_CLOCK_BLOCK = 512


@triton.jit
def _load(
    p, sample, offsets, mask, batch, n, guidance, COMPUTE: tl.constexpr, GUIDED: tl.constexpr
):
    """The guided prediction and the conditional one of a sample."""
    first = tl.load(p + sample * n + offsets, mask, other=0.0).to(COMPUTE)
    conditional = first
    if GUIDED:
        conditional = tl.load(p + (batch + sample) * n + offsets, mask, other=0.0).to(COMPUTE)
        first = first + tl.load(guidance) * (conditional - first)
    return first, conditional


@triton.jit
def _mean_and_squares(value, mask, count):
    mean = tl.sum(value, axis=0) / count
    distance = tl.where(mask, value - mean, 0.0)
    return mean, tl.sum(distance * distance, axis=0)


@triton.jit
def moments_kernel(
    p0,
    p1,
    p2,
    p3,
    guidance,
    moments,
    batch,
    n,
    blocks,
    SERVED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For every prediction, sample and block: means and squared distances from them, of the
    conditional and of the guided prediction. The grid is (blocks, batch)."""
    block = tl.program_id(0)
    sample = tl.program_id(1)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    count = tl.minimum(n - block * BLOCK, BLOCK).to(COMPUTE)
    for i in tl.static_range(SERVED):
        if i == 0:
            p = p0
        elif i == 1:
            p = p1
        elif i == 2:
            p = p2
        else:
            p = p3
        guided, conditional = _load(p, sample, offsets, mask, batch, n, guidance, COMPUTE, True)
        out = moments + ((i * batch + sample) * blocks + block) * 4
        mean, squares = _mean_and_squares(conditional, mask, count)
        tl.store(out, mean)
        tl.store(out + 1, squares)
        mean, squares = _mean_and_squares(guided, mask, count)
        tl.store(out + 2, mean)
        tl.store(out + 3, squares)


@triton.jit
def _squares_of_all(part, blocks, n, COMPUTE: tl.constexpr, BLOCK: tl.constexpr, PAD: tl.constexpr):
    """Squared distances from the mean over a whole sample, from those of its blocks."""
    block = tl.arange(0, PAD)
    mask = block < blocks
    count = tl.where(mask, tl.minimum(n - block * BLOCK, BLOCK), 0).to(COMPUTE)
    mean = tl.load(part + block * 4, mask, other=0.0)
    squares = tl.load(part + block * 4 + 1, mask, other=0.0)
    distance = mean - tl.sum(mean * count, axis=0) / n
    return tl.sum(squares + count * distance * distance, axis=0)


@triton.jit
def update_kernel(
    state,
    table,
    scales,
    step,
    guidance,
    moments,
    p0,
    p1,
    p2,
    p3,
    into,
    batch,
    n,
    blocks,
    AHEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    PAD: tl.constexpr,
    SERVED: tl.constexpr,
    GUIDED: tl.constexpr,
    RESCALED: tl.constexpr,
    COPIES: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
    MOMENTS_BLOCK: tl.constexpr,
    MOMENTS_PAD: tl.constexpr,
):
    """SERVED steps of the sampler, from the step that ``step`` holds. The grid is (blocks of a
    sample, batch)."""
    sample = tl.program_id(1)
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    size = batch * n
    row = tl.arange(0, PAD)
    inside = row < WIDTH
    where = state + row[:, None] * size + sample * n + offsets[None, :]
    held = inside[:, None] & mask[None, :]
    now = tl.load(where, held, other=0.0)
    k = tl.load(step) + AHEAD
    for i in tl.static_range(SERVED):
        if i == 0:
            p = p0
        elif i == 1:
            p = p1
        elif i == 2:
            p = p2
        else:
            p = p3
        noise, _ = _load(p, sample, offsets, mask, batch, n, guidance, COMPUTE, GUIDED)
        if RESCALED:
            part = moments + (i * batch + sample) * blocks * 4
            wanted = _squares_of_all(part, blocks, n, COMPUTE, MOMENTS_BLOCK, MOMENTS_PAD)
            got = _squares_of_all(part + 2, blocks, n, COMPUTE, MOMENTS_BLOCK, MOMENTS_PAD)
            share = tl.load(guidance + 1)
            noise = noise * (share * tl.sqrt(wanted / got) + (1.0 - share))
        weights = table + (k + i) * WIDTH * (WIDTH + 1) + row * (WIDTH + 1)
        both = inside[:, None] & inside[None, :]
        memory = tl.load(weights[:, None] + row[None, :], both, other=0.0)
        fresh = tl.load(weights + WIDTH, inside, other=0.0)
        now = tl.sum(memory[:, :, None] * now[None, :, :], axis=1) + fresh[:, None] * noise[None, :]
        now = tl.where((row == 0)[:, None], now.to(ROUND).to(COMPUTE), now)
    tl.store(where, now, held)
    latents = tl.sum(tl.where((row == 0)[:, None], now, 0.0), axis=0)
    scaled = tl.load(scales + k + SERVED) * latents
    for i in tl.static_range(COPIES):
        tl.store(into + i * size + sample * n + offsets, scaled.to(into.dtype.element_ty), mask)


@triton.jit
def clock_kernel(
    ticks,
    table,
    target,
    step,
    count,
    served,
    HAS_TARGET: tl.constexpr,
    HAS_STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Advance a rank's counters, and copy the next tick's row of the table, ``count`` elements, to
    the target. Every program counts for itself, so that none has to wait for the others' reading.
    """
    program = tl.program_id(0)
    now = tl.load(ticks + program) + 1
    if HAS_TARGET:
        offsets = program * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < count
        tl.store(target + offsets, tl.load(table + now * count + offsets, mask), mask)
    before = 0
    if HAS_STEP:
        before = tl.load(step)
    tl.debug_barrier()  # one thread writes the counters: not before all have read them
    tl.store(ticks + program, now)
    if HAS_STEP:
        tl.store(step, before + served, program == 0)


_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def advance(
    state: torch.Tensor,
    table: torch.Tensor,
    scales: torch.Tensor,
    step: torch.Tensor,
    guidance: torch.Tensor,
    predictions: list[torch.Tensor],
    into: torch.Tensor | None,
    *,
    dtype: torch.dtype,
    guided: bool,
    rescaled: bool,
    moments: torch.Tensor | None,
) -> None:
    """Launch what :func:`asyncdiff.update.reference` computes, on the current stream."""
    width, batch = state.shape[:2]
    n = state[0, 0].numel()
    pad = triton.next_power_of_2(width)
    block = max(64, 512 // pad**2)
    part = moments_block(n)
    parts = triton.cdiv(n, part)
    compute = _TYPES[state.dtype]
    for ahead in range(0, len(predictions), MOST):
        some = predictions[ahead : ahead + MOST]
        pointers = some + some[:1] * (MOST - len(some))
        last = ahead + MOST >= len(predictions)
        if rescaled:
            assert moments is not None
            moments_kernel[(parts, batch)](
                *pointers, guidance, moments, batch, n, parts, len(some), compute, part
            )
        update_kernel[(triton.cdiv(n, block), batch)](
            state,
            table,
            scales,
            step,
            guidance,
            moments if rescaled else guidance,
            *pointers,
            into if into is not None else state,
            batch,
            n,
            parts,
            AHEAD=ahead,
            WIDTH=width,
            PAD=pad,
            SERVED=len(some),
            GUIDED=guided,
            RESCALED=rescaled,
            COPIES=into.shape[0] // batch if last and into is not None else 0,
            COMPUTE=compute,
            ROUND=_TYPES[dtype],
            BLOCK=block,
            MOMENTS_BLOCK=part,
            MOMENTS_PAD=triton.next_power_of_2(parts),
        )


def moments_block(n: int) -> int:
    """Elements of a sample that one program of the moments takes: at most 256 programs a sample."""
    return max(1024, triton.next_power_of_2(triton.cdiv(n, 256)))


def moments_like(state: torch.Tensor) -> torch.Tensor:
    """Memory for the moments of a state's predictions."""
    batch, n = state.shape[1], state[0, 0].numel()
    return state.new_empty(MOST, batch, triton.cdiv(n, moments_block(n)), 4)


def ticks_of(target: torch.Tensor | None) -> int:
    """How many counters of ticks a clock with this target has: one for each program."""
    return 1 if target is None else triton.cdiv(target.numel(), _CLOCK_BLOCK)


def tick(
    ticks: torch.Tensor,
    table: torch.Tensor | None,
    target: torch.Tensor | None,
    step: torch.Tensor | None,
    served: int,
) -> None:
    """Launch the clock on the current stream."""
    any_: Any = ticks
    clock_kernel[(ticks.numel(),)](
        ticks,
        any_ if table is None else table,
        any_ if target is None else target,
        any_ if step is None else step,
        0 if target is None else target.numel(),
        served,
        HAS_TARGET=target is not None,
        HAS_STEP=step is not None,
        BLOCK=_CLOCK_BLOCK,
    )
