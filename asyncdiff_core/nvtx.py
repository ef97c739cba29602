"""Ranges in a profiler's timeline, in the NVTX domain "asyncdiff"."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from . import _core


@contextlib.contextmanager
def nvtx_range(operation: str, **what: object) -> Iterator[None]:
    """``operation key=value ...`` around a block; nothing is formatted where no tool listens."""
    if not _core.nvtx_listening():
        yield
        return
    _core.nvtx_push(" ".join([operation, *(f"{k}={v}" for k, v in what.items())]))
    try:
        yield
    finally:
        _core.nvtx_pop()
