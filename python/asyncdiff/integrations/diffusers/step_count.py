"""How many steps a scheduler has taken while a pipeline runs.

Its ``step`` is wrapped where it is: pipelines compare the types of schedulers, so it keeps its own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any


class _Counted:
    """The ``step`` of a scheduler, counted together with those of its deep copies: some pipelines
    have one for sound, or for each frame."""

    def __init__(self, scheduler: Any, counts: list[int]) -> None:
        self._scheduler = scheduler
        self.counts = counts
        functools.update_wrapper(self, scheduler.step)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.counts[0] += 1
        return type(self._scheduler).step(self._scheduler, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Counted:
        """That of the copy of the scheduler, of which this is a part."""
        return _Counted(memo.get(id(self._scheduler), self._scheduler), self.counts)


@contextlib.contextmanager
def counting(scheduler: Any) -> Iterator[None]:
    """Count its steps, for :func:`steps_of`, as long as this lasts. None, and one whose ``step`` is
    not that of its class, will do, but are not counted."""
    own = getattr(scheduler, "__dict__", None)
    if own is None or "step" in own or not callable(getattr(type(scheduler), "step", None)):
        yield
        return
    own["step"] = mine = _Counted(scheduler, [0])
    try:
        yield
    finally:
        if own.get("step") is mine:  # else somebody has put another one there meanwhile
            del own["step"]


def steps_of(scheduler: Any) -> int:
    """How many steps it and its copies have taken since then; 0 for one that is not counted."""
    step = getattr(scheduler, "__dict__", {}).get("step")
    return step.counts[0] if isinstance(step, _Counted) else 0
