"""Environment variables that Python code of ours reads itself; the core reads the others, and
``ASYNCDIFF_CACHE`` too, in csrc/src/env.cpp."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import InputError

#: Seconds. One piece that inductor compiles takes minutes and says nothing meanwhile.
_PREPARE_DEADLINE = 900.0


def cache_folder() -> Path | None:
    """Where measurements and preparations are kept: ``ASYNCDIFF_CACHE``, else
    ``$XDG_CACHE_HOME/asyncdiff``, else ``~/.cache/asyncdiff``. None for nowhere: "off", or no home.

    The same folder as the core's.
    """
    given = os.environ.get("ASYNCDIFF_CACHE", "")
    if given:
        return None if given == "off" else Path(given)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if shared:
        return Path(shared) / "asyncdiff"
    home = os.environ.get("HOME", "")
    return Path(home) / ".cache" / "asyncdiff" if home else None


def prepare_deadline() -> float:
    """Seconds for which a process that prepares may say nothing of going on, before others give it
    up: ``ASYNCDIFF_PREPARE_DEADLINE``, else 900. Raises InputError for what is not a positive
    number of seconds, at most a day."""
    given = os.environ.get("ASYNCDIFF_PREPARE_DEADLINE", "")
    try:
        seconds = float(given) if given else _PREPARE_DEADLINE
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86400:
        raise InputError(
            f"ASYNCDIFF_PREPARE_DEADLINE={given!r}: write a positive number of seconds, at most a "
            "day"
        )
    return seconds


def compile_workers() -> int | None:
    """How many processes compile at the same time: ``ASYNCDIFF_COMPILE_WORKERS``; None where it is
    not set. With 0 this process compiles alone. Raises InputError for what is no such number."""
    given = os.environ.get("ASYNCDIFF_COMPILE_WORKERS", "")
    if not given:
        return None
    if not given.isdecimal():
        raise InputError(
            f"ASYNCDIFF_COMPILE_WORKERS={given}: write how many processes compile, 0 for none "
            "besides this one"
        )
    return int(given)


def device_queues() -> int:
    """How many queues of a GPU the streams of this process share: CUDA's own
    ``CUDA_DEVICE_MAX_CONNECTIONS``, else 8. CUDA reads it when it starts, and takes 1 to 32."""
    given = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "")
    return min(max(int(given), 1), 32) if given.isdecimal() else 8
