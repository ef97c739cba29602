"""Which of the other processes of a group have ended."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def identity() -> dict[str, Any]:
    """Who this process is, for others: its host, and what it is called there."""
    return {
        "host": f"{socket.gethostname()} {_read('/proc/sys/kernel/random/boot_id')}",
        "names": _namespace(),
        "pid": os.getpid(),
        "began": _began(os.getpid()),
    }


class Liveness:
    """Process descriptors (pidfd_open, Linux 5.3) of the processes on this host. Of others, and
    where there are no descriptors, nothing is known: they count as alive."""

    def __init__(self, identities: Sequence[dict[str, Any]], own: int) -> None:
        self._poll = select.poll()
        self._whose: dict[int, int] = {}
        self._ended: set[int] = set()
        mine = identities[own]
        for process, who in enumerate(identities):
            same = all(who[key] == mine[key] for key in ("host", "names"))
            if process != own and same and mine["names"] is not None:
                self._watch(process, who)

    def ended(self) -> set[int]:
        """The processes that are known to have ended, without waiting."""
        for descriptor, _ in self._poll.poll(0):
            process = self._whose.pop(descriptor)
            self._poll.unregister(descriptor)
            os.close(descriptor)
            self._ended.add(process)
        return self._ended

    def close(self) -> None:
        """Give the descriptors back."""
        for descriptor in self._whose:
            self._poll.unregister(descriptor)
            os.close(descriptor)
        self._whose.clear()

    def _watch(self, process: int, who: dict[str, Any]) -> None:
        if not hasattr(os, "pidfd_open"):
            return
        try:
            descriptor = os.pidfd_open(who["pid"])
        except ProcessLookupError:
            self._ended.add(process)
            return
        except OSError:
            return
        if _began(who["pid"]) != who["began"]:  # its number is another's by now
            os.close(descriptor)
            self._ended.add(process)
            return
        self._whose[descriptor] = process
        self._poll.register(descriptor, select.POLLIN)


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def _namespace() -> int | None:
    """Which processes this one knows by their numbers: containers may have their own."""
    with contextlib.suppress(OSError):
        return os.stat("/proc/self/ns/pid").st_ino
    return None


def _began(pid: int) -> str:
    """When a process began, in ticks since the machine was started."""
    # Its name, in parentheses, may hold anything.
    return "".join(_read(f"/proc/{pid}/stat").rpartition(")")[2].split()[19:20])
