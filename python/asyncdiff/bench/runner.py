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
from .worker import ENVIRONMENT, Job

#: After its time is up a process may still end the measurement that it is in.
_GRACE = 15.0
#: After one process has failed the others are given this long.
_SURVIVORS = 3.0

Tell = Callable[[str], None]
Pairs = list[tuple[str, str]]


def run(
    settings: Settings, cases: Sequence[Case], ways: Sequence[Way], tell: Tell = lambda text: None
) -> Results:
    """Measure every case for every way, and say of the others why not. Does not raise for what
    fails while measuring: that is in ``left_out``, as failed."""
    begun = time.monotonic()
    results = Results(settings.devices)
    machine = settings.machine
    here: Pairs = []
    spread_out: Pairs = []
    for case in cases:
        for way in ways:
            reason = case.left_out(machine, way)
            if reason is not None:
                results.left_out.append(LeftOut(case.key, way.key, reason))
            else:
                (spread_out if way.distributed else here).append((case.key, way.key))
    # One after the other: both at once would share GPUs and links.
    with tempfile.TemporaryDirectory(prefix="asyncdiff-bench-") as folder:
        if here:
            _Group(settings, here, Path(folder) / "here", results, tell).run(0)
        if spread_out:
            alone = replace(settings, devices=settings.devices[: machine.processes])
            _Group(alone, spread_out, Path(folder) / "apart", results, tell).run(machine.processes)
    results.seconds = time.monotonic() - begun
    return results


class _Group:
    """One process with all ranks, or a process for each rank, and what they write."""

    def __init__(
        self, settings: Settings, pairs: Pairs, folder: Path, results: Results, tell: Tell
    ) -> None:
        folder.mkdir()
        self._settings = settings
        self._pairs = pairs
        self._folder = folder
        self._out = folder / "figures.jsonl"
        self._out.touch()
        self._results = results
        self._tell = tell
        self._read = 0
        self._children: list[subprocess.Popen[bytes]] = []
        self._logs: list[Path] = []
        self._done: set[tuple[str, str]] = set()

    def run(self, processes: int) -> None:
        """``processes`` with a rank each; 0: one with all."""
        store: Any = None
        if processes:
            from torch._C._distributed_c10d import TCPStore

            store = TCPStore(
                "127.0.0.1", 0, is_master=True, wait_for_workers=False,
                timeout=timedelta(seconds=60),
            )  # fmt: skip
        until = time.time() + self._settings.seconds
        port = store.port if processes else 0
        path = self._folder / "job.json"
        Job(self._settings, tuple(self._pairs), until, str(self._out), port).write(path)
        try:
            for rank in range(processes) if processes else [-1]:
                self._start(path, rank)
            reason = self._wait(until + _GRACE)
        finally:
            for child in self._children:
                child.kill()
                child.wait()
        self._collect()
        for case, way in self._pairs:
            if reason is not None and (case, way) not in self._done:
                self._results.left_out.append(LeftOut(case, way, reason, failed=True))

    def _start(self, path: Path, rank: int) -> None:
        command = [sys.executable, "-m", "asyncdiff.bench.worker", str(path), str(rank)]
        environment = {
            **os.environ,
            **ENVIRONMENT,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),  # as we were found
        }
        self._logs.append(self._folder / f"{rank}.log")
        with open(self._logs[-1], "wb") as log:
            self._children.append(
                subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
                )
            )

    def _wait(self, until: float) -> str | None:
        """Until all processes have ended. Why they have not measured everything; None if so."""
        first: tuple[int, int] | None = None
        while any(child.poll() is None for child in self._children):
            if time.time() > until:
                return self._why(None, f"did not end in time ({self._settings.seconds:.0f} s)")
            codes = [child.poll() for child in self._children]
            bad = [(i, code) for i, code in enumerate(codes) if code]
            if bad and first is None:
                first, until = bad[0], min(until, time.time() + _SURVIVORS)
            self._collect()
            time.sleep(0.05)
            if first is not None and time.time() > until:
                break
        if first is None:
            bad = [(i, c.returncode) for i, c in enumerate(self._children) if c.returncode]
            first = bad[0] if bad else None
        if first is not None:
            return self._why(first[0], f"ended with {first[1]}")
        return None

    def _why(self, place: int | None, what: str) -> str:
        """With the last line that the process, or the first that has one, has printed."""
        last = ""
        for log in self._logs if place is None else [self._logs[place]]:
            lines = [x.strip() for x in log.read_text(errors="replace").splitlines() if x.strip()]
            if lines and not last:
                last = f": {lines[-1]}"
        who = "the measurement" if place is None else f"process {place} of the measurement"
        return f"{who} {what}{last}"

    def _collect(self) -> None:
        """What has been written since the last time, whole lines only."""
        with open(self._out, "rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            for kind, data in json.loads(line).items():
                self._take(kind, data)

    def _take(self, kind: str, data: Any) -> None:
        if kind == "figure":
            self._results.figures.append(Figure.from_dict(data))
        elif kind == "left_out":
            self._results.left_out.append(LeftOut(**data))
        else:
            case, way = data
            self._done.add((case, way))
            self._tell(f"{case}: {way} ({len(self._done)} of {len(self._pairs)})")
