"""Runs beside each other on one machine: they prepare together, and each of them times alone."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


class Lock:
    """A file that all runs hold shared while they prepare, and each alone while it times: so that
    nobody times before all have prepared. Without a file it does nothing."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else path.open("a")
        self._gpus = None if path is None else path.with_name(f"{path.name}.gpus").open("a")

    def prepare(self) -> None:
        """Begin to prepare."""
        self._take(fcntl.LOCK_SH)

    def time(self) -> None:
        """Begin to time, once all others have prepared and nobody times."""
        self._take(fcntl.LOCK_UN)  # two that held it and waited for more would wait for each other
        self._take(fcntl.LOCK_EX)

    def free(self) -> None:
        """Let the others time."""
        self._take(fcntl.LOCK_UN)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Part of preparing that times something on a GPU, or keeps one busy: one run at a time.
        Not within another one."""
        if self._gpus is None:
            yield
            return
        fcntl.flock(self._gpus, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._gpus, fcntl.LOCK_UN)

    def _take(self, how: int) -> None:
        if self._file is not None:
            fcntl.flock(self._file, how)
