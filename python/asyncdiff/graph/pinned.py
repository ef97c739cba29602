"""Copies from a GPU to new host memory, by way of pinned memory.

Straight copies take what one processor takes to make the pages of new memory, and to copy to them:
gigabytes a second. Here the GPU fills a pinned buffer while all processors, as torch copies,
empty another one into its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch

#: Bytes of a buffer.
_STAGE = 64 << 20
_BUFFERS = 2

#: Where bytes go to, and where they are: flat uint8.
_Part = tuple[torch.Tensor, torch.Tensor]


def copy_to_host(
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]],
    turn: Callable[[], AbstractContextManager[None]],
    stage: int = _STAGE,
) -> None:
    """Copy to the first of each pair, in host memory, the second, of the same shape, strides and
    dtype, on the current stream of its device. All is done when it returns.

    ``turn`` is entered for a few milliseconds at a time; outside of it nothing is copied. Raises
    what allocating and copying raise.
    """
    buffers: list[torch.Tensor] = []
    full: tuple[list[_Part], torch.Tensor, torch.cuda.Event | None] | None = None
    for number, parts in enumerate(_stages(pairs, stage)):
        with turn():
            cuda = parts[0][1].is_cuda
            if len(buffers) < _BUFFERS:
                buffers.append(torch.empty(stage, dtype=torch.uint8, pin_memory=cuda))
            buffer = buffers[number % _BUFFERS]
            at = 0
            for _, source in parts:
                buffer[at : at + len(source)].copy_(source, non_blocking=True)
                at += len(source)
            filled = None
            if cuda:
                filled = torch.cuda.current_stream(parts[0][1].device).record_event()
            _empty(full)
            full = parts, buffer, filled
    with turn():
        _empty(full)


def _empty(full: tuple[list[_Part], torch.Tensor, torch.cuda.Event | None] | None) -> None:
    """Copy what a buffer is full of to where it goes, once it is there."""
    if full is None:
        return
    parts, buffer, filled = full
    if filled is not None:
        filled.synchronize()
    at = 0
    for target, _ in parts:
        target.copy_(buffer[at : at + len(target)])
        at += len(target)


def _stages(
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], stage: int
) -> Iterator[list[_Part]]:
    """All bytes, as much at a time as a buffer holds, of one device."""
    parts: list[_Part] = []
    room = stage
    for host, original in pairs:
        target, source = _bytes_of(host), _bytes_of(original)
        if parts and parts[0][1].device != source.device:
            yield parts
            parts, room = [], stage
        begin = 0
        while begin < len(source):
            end = min(len(source), begin + room)
            parts.append((target[begin:end], source[begin:end]))
            room -= end - begin
            begin = end
            if room == 0:
                yield parts
                parts, room = [], stage
    if parts:
        yield parts


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a dense tensor. Raises RuntimeError for one with gaps."""
    strides, shape = tensor.stride(), tensor.shape
    order = sorted(range(tensor.dim()), key=lambda d: (strides[d], shape[d]), reverse=True)
    return tensor.permute(order).view(-1).view(torch.uint8)


def dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor is all of the memory from its first element to its last."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() > 0 and last + 1 == tensor.numel()
