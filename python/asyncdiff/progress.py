"""How far long preparations are."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

#: Called with what is done, how much of it, and of how much.
Progress = Callable[[str, int, int], None]


@contextlib.contextmanager
def bar(progress: Progress | None) -> Iterator[Progress]:
    """``progress`` itself, or a bar on stderr where that is a terminal; it vanishes at the end."""
    if progress is not None:
        yield progress
        return
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.errors import LiveError
    from rich.progress import Progress as Bar

    with contextlib.ExitStack() as stack:
        shown = Bar(console=Console(stderr=True), transient=True)
        try:
            stack.enter_context(shown)
        except LiveError:  # the program draws a bar of its own already
            yield lambda what, done, total: None
            return
        tasks = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=done)

        yield update
