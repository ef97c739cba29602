"""Starts the processes that measure, collects what they write, and ends those that hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from .cases.case import Case
from .figures import Figure, LeftOut, Results
from .settings import Settings
from .ways import Way
from .worker import ENVIRONMENT, Job, Pair

_START = 60.0  # seconds until processes have to be ready
_GRACE = 15.0  # for the measurement that a process is in when its time is up
_SURVIVORS = 3.0  # for the other processes when one has failed
_RESTARTS = 3

Tell = Callable[[str], None]


def run(
    settings: Settings, cases: Sequence[Case], ways: Sequence[Way], tell: Tell = lambda text: None
) -> Results:
    """Measure every case for every way, and say of the others why not. Does not raise for what
    fails while measuring: that is in ``left_out``, as failed."""
    begun = time.monotonic()
    results = Results(settings.devices)
    machine = settings.machine
    here: list[Pair] = []
    apart: list[Pair] = []
    for case in cases:
        for way in ways:
            reason = case.left_out(machine, way)
            if reason is not None:
                results.left_out.append(LeftOut(case.key, way.key, reason))
            else:
                (apart if way.distributed else here).append((case.key, way.key))
    alone = replace(settings, devices=settings.devices[: machine.processes])
    with tempfile.TemporaryDirectory(prefix="asyncdiff-bench-") as folder:
        # Those of several processes are started at once, for importing torch takes seconds; but
        # they touch no GPU before the others have ended.
        several = _Group(alone, apart, Path(folder, "apart"), machine.processes) if apart else None
        try:
            if here:
                _finish(_Group(settings, here, Path(folder, "here"), 0), results, tell)
            if several is not None:
                _finish(several, results, tell)
        finally:
            if several is not None:
                several.end()
    results.seconds = time.monotonic() - begun
    return results


def _finish(group: _Group, results: Results, tell: Tell) -> None:
    """Run a group to its end. If it dies, what it was at has failed; a new one does the rest."""
    limit = time.monotonic() + group.settings.seconds
    for attempt in range(_RESTARTS + 1):
        reason = group.run(results, tell)
        rest = group.rest()
        if reason is None or not rest:
            return
        left = limit - time.monotonic()
        last = attempt == _RESTARTS or left <= 0
        for case, way in rest if last else rest[:1]:
            results.left_out.append(LeftOut(case, way, reason, failed=True))
        if last or not rest[1:]:
            return
        group = group.again(rest[1:], left)


class _Group:
    """One process with all ranks (``processes`` 0), or one for each rank, and what they write."""

    def __init__(
        self, settings: Settings, pairs: Sequence[Pair], folder: Path, processes: int
    ) -> None:
        folder.mkdir()
        self.settings = settings
        self._pairs = tuple(pairs)
        self._folder = folder
        self._processes = processes
        self._out = folder / "figures.jsonl"
        self._out.touch()
        self._read = 0
        self._done: set[Pair] = set()
        self._children: list[subprocess.Popen[bytes]] = []
        self._logs: list[Path] = []
        self._store: Any = None
        port = 0
        if processes:
            from torch._C._distributed_c10d import TCPStore

            wait = timedelta(seconds=_START)
            self._store = TCPStore(
                "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=wait
            )
            port = self._store.port
        job = folder / "job.json"
        Job(settings, self._pairs, str(self._out), port).write(job)
        for rank in range(processes) if processes else [-1]:
            self._start(job, rank)

    def _start(self, job: Path, rank: int) -> None:
        command = [sys.executable, "-m", "asyncdiff_bench.worker", str(job), str(rank)]
        environment = {
            # Streams that share a hardware queue wait for each other, which kernels that wait for
            # a peer on the same GPU must not: as many queues as there can be, not eight.
            "CUDA_DEVICE_MAX_CONNECTIONS": "32",
            **os.environ,
            **ENVIRONMENT,
            # Several processes are the hosts of the way between hosts.
            **({"ASYNCDIFF_HOST": f"host{rank}"} if self._processes else {}),
            # As we were found.
            "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path if p),
        }
        self._logs.append(self._folder / f"{rank}.log")
        with open(self._logs[-1], "wb") as log:
            self._children.append(
                # Not in this folder: its sources must not hide what is installed.
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    cwd=self._folder,
                )
            )

    def again(self, pairs: Sequence[Pair], seconds: float) -> _Group:
        """New processes for what is left."""
        settings = replace(self.settings, seconds=seconds)
        return _Group(settings, pairs, self._folder / "again", self._processes)

    def rest(self) -> list[Pair]:
        """What has not come to its end."""
        return [p for p in self._pairs if p not in self._done]

    def run(self, results: Results, tell: Tell) -> str | None:
        """Until all processes have ended. Why they have not measured everything; None if so."""
        if self._store is not None:
            self._store.set("go", "go")
        limit = time.monotonic() + _START + self.settings.seconds + _GRACE
        failed: tuple[int, int] | None = None
        late = False
        try:
            while not late and any(c.poll() is None for c in self._children):
                self._collect(results, tell)
                time.sleep(0.05)
                if failed is None:
                    failed = self._failed()
                    limit = limit if failed is None else time.monotonic() + _SURVIVORS
                late = time.monotonic() > limit
            failed = failed or self._failed()
        finally:
            self.end()
        self._collect(results, tell)
        if failed is not None:
            return self._why(failed[0], f"ended with {failed[1]}")
        return self._why(None, "did not end in time") if late else None

    def end(self) -> None:
        """End the processes that still run."""
        for child in self._children:
            child.kill()
            child.wait()

    def _failed(self) -> tuple[int, int] | None:
        """The first process that has failed, and its exit code."""
        codes = ((i, c.poll()) for i, c in enumerate(self._children))
        return next(((i, code) for i, code in codes if code), None)

    def _why(self, place: int | None, what: str) -> str:
        """With the last line that the process, or the first that has one, has printed."""
        last = ""
        for log in self._logs if place is None else [self._logs[place]]:
            lines = [x.strip() for x in log.read_text(errors="replace").splitlines() if x.strip()]
            if lines and not last:
                last = f": {lines[-1]}"
        who = "the measurement" if place is None else f"process {place} of the measurement"
        return f"{who} {what}{last}"

    def _collect(self, results: Results, tell: Tell) -> None:
        """What has been written since the last time, whole lines only."""
        with open(self._out, "rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            for kind, data in json.loads(line).items():
                if kind == "figure":
                    results.figures.append(Figure.from_dict(data))
                elif kind == "left_out":
                    results.left_out.append(LeftOut(**data))
                else:
                    case, way = data
                    self._done.add((case, way))
                    tell(f"{case}: {way} ({len(self._done)} of {len(self._pairs)})")
