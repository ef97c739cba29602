"""Ranges in a profiler's timeline, in the NVTX domain "asyncdiff"."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from . import _core

_NOBODY_LISTENS = contextlib.nullcontext()


def nvtx_range(operation: str, **what: object) -> contextlib.AbstractContextManager[None]:
    """``operation key=value ...`` around a block; nothing is formatted where no tool listens."""
    return _range(operation, what) if _core.nvtx_listening() else _NOBODY_LISTENS


@contextlib.contextmanager
def _range(operation: str, what: Mapping[str, object]) -> Iterator[None]:
    _core.nvtx_push(" ".join([operation, *(f"{k}={v}" for k, v in what.items())]))
    try:
        yield
    finally:
        _core.nvtx_pop()
