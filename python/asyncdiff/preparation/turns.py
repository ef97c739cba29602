"""Processes that prepare the same at the same time: one of them does, the others take what it
found."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator

from ..progress import heartbeat, stage
from .folder import Folder

log = logging.getLogger("asyncdiff")

#: Seconds that a process waits for another one, before it prepares by itself.
PATIENCE = 300.0
_POLL = 0.05
_WAITING = "waiting for another process that prepares the same"


@contextlib.contextmanager
def alone(folder: Folder, kind: str, key: str) -> Iterator[None]:
    """Inside, no other process of this user prepares the same, unless this one has waited for that
    in vain. A process that has ended is not waited for. Without a folder nothing is waited for."""
    handle = _opened(folder, kind, key)
    try:
        if handle is not None and not _locked(handle):
            with stage(_WAITING):
                _wait(handle)
        yield
    finally:
        if handle is not None:
            os.close(handle)  # and with it the lock


def _opened(folder: Folder, kind: str, key: str) -> int | None:
    if not folder.usable():
        return None
    path = folder.file(kind, key).with_suffix(".lock")
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        return None


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:  # a file system without locks
        log.debug("preparations are not shared: %s", e)
    return True


def _wait(handle: int) -> None:
    until = time.monotonic() + PATIENCE
    while not _locked(handle):
        if time.monotonic() > until:
            log.warning(
                "another process has prepared the same for more than %g s: this one does not wait "
                "for it any longer",
                PATIENCE,
            )
            return
        heartbeat(_WAITING)
        time.sleep(_POLL)
