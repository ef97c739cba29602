"""Denoisers in processes that were made by ``fork()``: the threads of their ranks stayed behind."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

from .errors import InputError


class Forked:
    """In the place of a lock that a thread of the parent may have held: nobody gets it."""

    def __enter__(self) -> None:
        raise InputError(
            "this denoiser was spread over ranks before the process was made by fork(), which "
            "leaves their threads behind: call restore() and parallelise again here, or make "
            "processes by 'spawn' (multiprocessing.set_start_method)"
        )

    def __exit__(self, *_: object) -> None:
        pass


class Locked:
    """What has a ``lock``, which is :class:`Forked` in processes made by ``fork()`` later."""

    def __init__(self) -> None:
        self.lock: Any = threading.RLock()
        _living.add(self)

    @property
    def forked(self) -> bool:
        """Whether this is a copy in a process made by ``fork()``."""
        return isinstance(self.lock, Forked)


_living: weakref.WeakSet[Locked] = weakref.WeakSet()


def _in_child() -> None:
    for locked in list(_living):
        locked.lock = Forked()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_in_child)
