"""Processes that prepare the same at the same time: one of them does, the others take what it
found."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from ..progress import heartbeat, stage

log = logging.getLogger("asyncdiff")

#: Seconds that a process waits for another one, before it prepares by itself.
PATIENCE = 300.0
_POLL = 0.05
_WAITING = "waiting for another process that prepares the same"


class Turn:
    """A file ``path`` that one process has at a time; None, or where none can be made: everybody
    has. It is let go of when the process ends, however that does."""

    def __init__(self, path: Path | None) -> None:
        self._handle: int | None = None
        if path is not None:
            with contextlib.suppress(OSError):
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                self._handle = os.open(path, flags, 0o600)

    def take(self) -> bool:
        """Have it, unless another one has; does not wait."""
        if self._handle is None:
            return True
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as e:  # a file system without locks
            log.debug("preparations are not shared: %s", e)
        return True

    def close(self) -> None:
        """Let go of it. Safe to call twice."""
        if self._handle is not None:
            os.close(self._handle)  # and with it the lock
            self._handle = None


@contextlib.contextmanager
def alone(path: Path | None) -> Iterator[None]:
    """Inside, no other process of this user has the turn ``path``, unless this one has waited for
    that in vain. A process that has ended is not waited for."""
    with contextlib.closing(Turn(path)) as turn:
        if not turn.take():
            with stage(_WAITING):
                _wait(turn)
        yield


def _wait(turn: Turn) -> None:
    until = time.monotonic() + PATIENCE
    while not turn.take():
        if time.monotonic() > until:
            log.warning(
                "another process has prepared the same for more than %g s: this one does not wait "
                "for it any longer",
                PATIENCE,
            )
            return
        heartbeat(_WAITING)
        time.sleep(_POLL)
