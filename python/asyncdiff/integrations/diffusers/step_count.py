"""How many steps a scheduler has taken while a pipeline runs, counted by a subclass of its own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, cast

from .subclass import named_like

_COUNT = "_asyncdiff_steps"


@contextlib.contextmanager
def counting(scheduler: Any) -> Iterator[None]:
    """Count its steps, for :func:`steps_of`, as long as this lasts. No scheduler will do, too."""
    if scheduler is None or not hasattr(type(scheduler), "step"):
        yield
        return
    base = type(scheduler)
    scheduler.__class__ = _counting_class(cast(Any, base))
    try:
        yield
    finally:
        scheduler.__class__ = base
        scheduler.__dict__.pop(_COUNT, None)


def steps_of(scheduler: Any) -> int:
    """How many steps it has taken since it was first counted; 0 for one that is not."""
    return int(getattr(scheduler, "__dict__", {}).get(_COUNT, 0))


@functools.cache
def _counting_class(base: Any) -> type:
    class Counting(base):  # type: ignore[misc]
        @functools.wraps(base.step)
        def step(self, *args: Any, **kwargs: Any) -> Any:
            self.__dict__[_COUNT] = self.__dict__.get(_COUNT, 0) + 1
            return base.step(self, *args, **kwargs)

    return named_like(Counting, base)
