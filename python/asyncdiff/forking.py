"""Objects whose threads stay behind where a process is made by ``fork()``."""

from __future__ import annotations

import os
import threading

from .errors import InputError


class Locked:
    """What has a lock that nobody gets in processes made by ``fork()`` later."""

    def __init__(self) -> None:
        self._lock, self._process = threading.RLock(), os.getpid()

    @property
    def forked(self) -> bool:
        """Whether this is a copy in a process made by ``fork()``, which leaves threads behind."""
        return os.getpid() != self._process

    @property
    def lock(self) -> threading.RLock:
        """Held by whoever runs a generation. Raises InputError in a process made by ``fork()``."""
        if self.forked:
            raise InputError(
                "this denoiser was spread over ranks before the process was made by fork(), which "
                "leaves their threads behind: call restore() and parallelise again here, or make "
                "processes by 'spawn' (multiprocessing.set_start_method)"
            )
        return self._lock
