"""Where times are taken, whoever else keeps the devices busy is asked to wait.

What takes times says so by :func:`undisturbed`; who can keep others quiet meanwhile says so further
out, by :func:`keeping`, so that nothing in between has to pass it on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

#: Makes what is open while others are quiet.
Quiet = Callable[[], AbstractContextManager[Any]]

_quiet: ContextVar[Quiet] = ContextVar("asyncdiff_quiet", default=contextlib.nullcontext)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Times are taken inside; also as a decorator."""
    with _quiet.get()():
        yield


@contextlib.contextmanager
def keeping(quiet: Quiet) -> Iterator[None]:
    """Meanwhile ``quiet`` keeps others quiet, too."""
    outer = _quiet.get()

    @contextlib.contextmanager
    def all_quiet() -> Iterator[None]:
        with outer(), quiet():
            yield

    before = _quiet.set(all_quiet)
    try:
        yield
    finally:
        _quiet.reset(before)
