"""A device's memory: how a lack of it shows, and what gives it back."""

from __future__ import annotations

import gc

import torch

import asyncdiff_core as core

#: How CUDA, its libraries and torch's allocator for the host say it, where the type does not.
_SAID = (
    "cudaErrorMemoryAllocation",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "STATUS_ALLOC_FAILED",
    "can't allocate memory",
)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that a device or the host has no memory left."""
    if error is None:
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = isinstance(error, (RuntimeError, core.CoreError)) and any(s in str(error) for s in _SAID)
    return said or out_of_memory(error.__cause__)


def collect() -> None:
    """Give back what closed engines had: programs refer to themselves, and torch keeps memory."""
    gc.collect()
    torch.cuda.empty_cache()
