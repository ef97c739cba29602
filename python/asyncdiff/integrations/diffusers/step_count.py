"""How many steps a scheduler has taken while a pipeline runs.

Its ``step`` is wrapped where it is: pipelines compare the types of schedulers, so it keeps its own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

#: What a scheduler has that is counted.
_OURS = ("step", "__reduce_ex__")


class _Counts:
    """How many steps a scheduler and its copies have taken, and their ``step``."""

    def __init__(self) -> None:
        self.steps = 0
        self.counted: list[_Counted] = []

    def __deepcopy__(self, memo: Any) -> _Counts:
        return self


class _Counted:
    """The ``step`` of a scheduler, counted together with those of its copies: some pipelines have
    one for sound, or for each frame."""

    def __init__(self, scheduler: Any, counts: _Counts) -> None:
        self.scheduler = scheduler
        self.counts = counts
        functools.update_wrapper(self, scheduler.step)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.counts.steps += 1
        return type(self.scheduler).step(self.scheduler, *args, **kwargs)


def _count(scheduler: Any, counts: _Counts) -> None:
    counted = _Counted(scheduler, counts)
    counts.counted.append(counted)
    scheduler.__dict__["step"] = counted
    scheduler.__dict__["__reduce_ex__"] = functools.partial(_reduce, scheduler, counts)


def _reduce(scheduler: Any, counts: _Counts, protocol: Any) -> Any:
    """What copies of a scheduler are made of, deep ones too: the step of each is its own."""
    state = {n: x for n, x in vars(scheduler).items() if n not in _OURS}
    return _copied, (type(scheduler), counts), state


def _copied(cls: type, counts: _Counts) -> Any:
    made: Any = object.__new__(cls)

    def take(state: dict[str, Any]) -> None:
        made.__dict__.clear()
        made.__dict__.update(state)
        _count(made, counts)

    made.__dict__["__setstate__"] = take
    return made


@contextlib.contextmanager
def counting(scheduler: Any) -> Iterator[None]:
    """Count its steps, for :func:`steps_of`, as long as this lasts. None, and one whose ``step`` is
    not that of its class, will do, but are not counted."""
    own = getattr(scheduler, "__dict__", None)
    if own is None or "step" in own or not callable(getattr(type(scheduler), "step", None)):
        yield
        return
    counts = _Counts()
    _count(scheduler, counts)
    try:
        yield
    finally:
        for counted in counts.counted:
            own = vars(counted.scheduler)
            own.pop("__reduce_ex__", None)
            if own.get("step") is counted:  # else somebody has put another one there meanwhile
                del own["step"]
        counts.counted.clear()


def steps_of(scheduler: Any) -> int:
    """How many steps it and its copies have taken since then; 0 for one that is not counted."""
    step = getattr(scheduler, "__dict__", {}).get("step")
    return step.counts.steps if isinstance(step, _Counted) else 0


def is_counted(scheduler: Any) -> bool:
    """Whether its steps are counted now."""
    return isinstance(getattr(scheduler, "__dict__", {}).get("step"), _Counted)
