"""Whether it was memory that lacked, and when Python looks for some to free."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator

import torch

from .errors import ProcessError

#: How CUDA, its libraries and torch's allocator for the host say it, where the type does not.
_SAID = (
    "cudaErrorMemoryAllocation",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "STATUS_ALLOC_FAILED",
    "can't allocate memory",
)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that a device or the host has no memory left; here,
    or in another process of the group."""
    if error is None:
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, ProcessError) and error.memory:
        return True
    said = isinstance(error, RuntimeError) and any(s in str(error) for s in _SAID)
    return said or out_of_memory(error.__cause__)


#: Whether nothing is collected because of us.
_paused = False


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Nothing is looked for meanwhile: what exports a denoiser, or makes ranks of it, makes so many
    objects that Python looks through all there are again and again, and hardly any that it could
    free."""
    global _paused
    if not gc.isenabled():
        yield
        return
    gc.disable()
    _paused = True
    try:
        yield
    finally:
        _paused = False
        gc.enable()


def collect_young() -> None:
    """Free what was made while nothing was collected because of us: for when whoever calls would
    only wait. It is looked through then, and not when collecting begins again."""
    if _paused:
        gc.collect(0)


def _in_child() -> None:
    if _paused:  # by a thread that a child has not
        gc.enable()


os.register_at_fork(after_in_child=_in_child)
