"""How far long preparations are, told to whoever shows it.

What takes long says so by :func:`stage` or :func:`tell`; who is told is decided further out, by
:func:`bar` or :func:`within`, so that nothing in between has to pass it on.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

#: Called with what is done, how much of it, and of how much. The last call of each has both equal.
Progress = Callable[[str, int, int], None]

_listening: ContextVar[tuple[Progress, ...]] = ContextVar("asyncdiff_progress", default=())


#: Called with what is done now.
Watch = Callable[[str], None]

_watching: ContextVar[tuple[Watch, ...]] = ContextVar("asyncdiff_watching", default=())


def heartbeat(doing: str) -> None:
    """Tell those who only want to know that this goes on, and with what; nobody shows it."""
    for watch in _watching.get():
        watch(doing)


@contextlib.contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Let ``watch`` know of each :func:`heartbeat` meanwhile, and of all that is told."""
    before = _watching.get()
    now = _watching.set(before if watch in before else (*before, watch))
    try:
        yield
    finally:
        _watching.reset(now)


def tell(what: str, done: int, total: int) -> None:
    """Tell everybody who listens."""
    heartbeat(f"{what}: {done} of {total}")
    for progress in _listening.get():
        progress(what, done, total)


@contextlib.contextmanager
def stage(what: str) -> Iterator[None]:
    """Something that takes a while and whose parts are not counted."""
    tell(what, 0, 1)
    try:
        yield
    finally:
        tell(what, 1, 1)


@contextlib.contextmanager
def within(progress: Progress) -> Iterator[None]:
    """Let ``progress`` listen meanwhile, too."""
    before = _listening.get()
    now = _listening.set(before if progress in before else (*before, progress))
    try:
        yield
    finally:
        _listening.reset(now)


@contextlib.contextmanager
def bar(progress: Progress | None) -> Iterator[Progress]:
    """Let ``progress`` listen meanwhile; where nobody does, a bar on stderr, if that is a terminal,
    which vanishes at the end. What it yields tells them."""
    with contextlib.ExitStack() as stack:
        if progress is None and not _listening.get():
            progress = _terminal(stack)
        if progress is not None:
            stack.enter_context(within(progress))
        yield tell


def _terminal(stack: contextlib.ExitStack) -> Progress | None:
    """A bar on stderr until ``stack`` ends; None where that is no terminal, or the program draws a
    bar of its own already."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console
    from rich.errors import LiveError
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    shown = Bar(*columns, console=Console(stderr=True), transient=True)
    try:
        stack.enter_context(shown)
    except LiveError:
        return None
    return Tasks(shown)


class Tasks:
    """A :data:`Progress` that shows what is under way in a bar of rich's: what is not counted as
    one that runs to and fro, and nothing of what is done."""

    def __init__(self, shown: Any) -> None:
        self._shown = shown
        self._tasks: dict[str, Any] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        shown = self._shown
        if done >= total:
            if what in self._tasks:
                shown.remove_task(self._tasks.pop(what))
            return
        if what not in self._tasks:
            self._tasks[what] = shown.add_task(what, total=total if total > 1 else None)
        shown.update(self._tasks[what], completed=done)
