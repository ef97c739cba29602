"""A pipeline's own bar of steps (tqdm) while its denoiser is prepared: it says what is done, and
does not count that as time of its steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ... import progress


@contextlib.contextmanager
def preparing(shown: Any) -> Iterator[None]:
    """Meanwhile what is prepared stands where ``shown``, the bar, has its description; afterwards
    its clock goes on where it stood. None, or a bar that the user has switched off: nothing is
    shown."""
    if shown is None or getattr(shown, "disable", True):
        yield
        return
    described = shown.desc

    def tell(what: str, done: int, total: int) -> None:
        if done < total:
            shown.set_description_str(f"{what} {done}/{total}" if total > 1 else what)
            return
        shown.set_description_str(described)
        # What follows is the steps' own time again.
        shown.unpause()

    with progress.within(tell):
        yield
    if shown.desc != described:  # what was under way has failed
        shown.set_description_str(described)
