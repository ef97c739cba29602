"""Processes that compile pieces at the same time, so that inductor finds them in its cache here."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import select
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from ...progress import heartbeat
from . import settings
from .transport import receive, send

log = logging.getLogger("asyncdiff")

#: Processes at most, by default; and bytes of the host's memory that each should find: torch,
#: inductor and what they make of a large piece.
_MOST = 16
_MEMORY = 3 << 29
#: Kernels at most that one of them compiles at the same time.
_KERNELS = 4
#: Cores up to which pieces are compiled one after another.
_FEW_CORES = 2
#: Seconds that a piece may take: a process that takes longer is stuck.
_PATIENCE = 600.0
#: Seconds for a message to get through, and for a process to end.
_MOMENT = 10.0
#: Seconds after which it is said again that this process waits for what others compile.
_BEAT = 1.0
#: The first thing that a process does: it looks for modules where this one does.
_START = """import json, sys
sys.path[:] = json.loads(sys.argv[1])
from asyncdiff.graph.compiled.worker import main
main(int(sys.argv[2]), int(sys.argv[3]))"""

_K = TypeVar("_K", bound=Hashable)


def default_count(processes: int = 1) -> int:
    """How many processes compile for one of so many on this host that all prepare: half as many as
    there are cores, as long as there is memory; none on two cores."""
    cores = _cores(processes)
    if cores <= _FEW_CORES:
        return 0
    return max(0, min(cores // 2, _MOST, _available() // processes // _MEMORY))


def threads_of(count: int, processes: int = 1) -> int:
    """How many kernels each of ``count`` processes compiles at the same time, so that all cores
    have something to do."""
    return max(1, min(_KERNELS, _cores(processes) // max(count, 1)))


class _Process:
    """A process that compiles, and what it is compiling now."""

    def __init__(self, threads: int, devices: Sequence[str]) -> None:
        mine, other = socket.socketpair()
        try:
            mine.settimeout(_MOMENT)
            with other:
                self._process = subprocess.Popen(
                    [
                        *(sys.executable, "-c", _START, json.dumps(sys.path)),
                        *(str(other.fileno()), str(os.getpid())),
                    ],
                    env=os.environ | _environment(threads, devices),
                    pass_fds=[other.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is for this process, which then ends that one
                )
        except BaseException:
            mine.close()
            raise
        self.connection = mine
        self.job: Any = None
        self._since = 0.0
        try:
            self.give(None, pickle.dumps((settings.here(), list(devices))))
        except BaseException:
            self.end()
            raise

    def give(self, job: Any, data: bytes) -> None:
        """Have it compile what ``data`` says. Where it has ended, it gives no answer."""
        self.job, self._since = job, time.monotonic()
        with contextlib.suppress(OSError):
            send(self.connection, data)

    def answer(self) -> str | None:
        """What went wrong, "" for nothing; None where there is no answer in a moment."""
        try:
            error, where = map(str, json.loads(receive(self.connection)))
        except (OSError, EOFError, ValueError):
            return None
        if error:
            log.debug("a process could not compile a piece:\n%s", where)
        return error

    @property
    def left(self) -> float:
        """Seconds until it counts as stuck."""
        return self._since + _PATIENCE - time.monotonic()

    def end(self) -> None:
        """End it, whatever it does."""
        self.connection.close()
        with contextlib.suppress(OSError):
            self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_MOMENT)


class Pool:
    """``count`` processes, each compiling ``threads`` kernels at the same time, that are there from
    :meth:`start` to :meth:`close`, and end with this one. They take no memory of GPUs. Used by one
    thread at a time."""

    def __init__(self, count: int, threads: int, devices: Sequence[str]) -> None:
        self._count, self._threads, self._devices = count, threads, devices
        self._processes: list[_Process] = []

    def start(self) -> None:
        """Start the processes, if they are not there, without waiting for them. Logs one line where
        they cannot be started."""
        if self._processes:
            return
        try:
            while len(self._processes) < self._count:
                self._processes.append(_Process(self._threads, self._devices))
        except Exception as e:  # settings that cannot be sent, too
            log.warning("pieces are compiled one after another, which is slower: %s", e)
            self.close()

    def compile(self, jobs: Mapping[_K, bytes]) -> Iterator[tuple[_K, str]]:
        """Have all of these pieces compiled (see :func:`~.transport.packed`), the first ones first:
        each, as soon as it is done, with what went wrong ("": nothing). Raises nothing."""
        waiting = deque(jobs.items())
        idle = list(self._processes)
        busy: list[_Process] = []
        try:
            while waiting or busy:
                while waiting and idle:
                    job, data = waiting.popleft()
                    busy.append(idle.pop())
                    busy[-1].give(job, data)
                if not busy:  # all are gone
                    break
                for process in self._heard(busy):
                    busy.remove(process)
                    error = process.answer() if process.left > 0 else None
                    if error is None:
                        self._lose(process)
                        error = "a process that compiles has ended, or is stuck"
                    else:
                        idle.append(process)
                    yield process.job, error
        finally:
            for process in busy:
                self._lose(process)
        for job, _ in waiting:
            yield job, "no process that compiles is left"

    def close(self) -> None:
        """End the processes, whatever they do. They can be started again."""
        while self._processes:
            self._processes.pop().end()

    def _heard(self, busy: Sequence[_Process]) -> list[_Process]:
        """Those that have something to say, have ended or are stuck; waits for one that has."""
        while True:
            heartbeat("compiling")
            left = max(0.0, min(process.left for process in busy))
            heard, _, _ = select.select([p.connection for p in busy], [], [], min(left, _BEAT))
            found = [p for p in busy if p.connection in heard or p.left <= 0]
            if found:
                return found

    def _lose(self, process: _Process) -> None:
        process.end()
        with contextlib.suppress(ValueError):
            self._processes.remove(process)


def _environment(threads: int, devices: Sequence[str]) -> dict[str, str]:
    """What a process that compiles has in its environment besides what this one has."""
    from torch._inductor.runtime import runtime_utils

    said = {"TORCHINDUCTOR_COMPILE_THREADS": str(threads), "TORCH_WARM_POOL": "0"}
    first = torch.device(devices[0]) if devices else torch.device("cpu")
    if first.type == "cuda":
        # Else each takes a folder by the number of the GPU that it compiles for first; in the same
        # one what is compiled for one GPU is found for the others.
        said["TRITON_CACHE_DIR"] = runtime_utils.triton_cache_dir(first.index or 0)  # type: ignore[attr-defined]
    return said


def _cores(processes: int) -> int:
    """The cores of one of so many processes of this host."""
    return len(os.sched_getaffinity(0)) // processes


def _available() -> int:
    """Bytes of the host's memory that are free, or can be made so."""
    try:
        with open("/proc/meminfo") as lines:
            said = dict(line.split(":", 1) for line in lines)
        return int(said["MemAvailable"].split()[0]) << 10
    except (OSError, ValueError, LookupError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
