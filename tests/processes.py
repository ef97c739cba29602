"""Starts the processes of core_worker.py, core_worker_cuda.py and nccl_worker.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Where scenarios lie, by how they begin; those of others in core_worker.py.
WORKERS = {"cuda": "core_worker_cuda.py", "nccl": "nccl_worker.py"}

#: The processes that tests of this process have started.
STARTED: set[int] = {os.getpid()}


def left_behind() -> set[str]:
    """Names of shared memory that processes of this process's tests have left."""
    names = {p.name for p in Path("/dev/shm").glob("asyncdiff-*")}
    return {name for name in names if int(name.split("-")[2]) in STARTED}


def on_host(name: str) -> dict[str, str]:
    """The environment of a process that counts as being on another host."""
    return os.environ | {"ASYNCDIFF_HOST": name, "ASYNCDIFF_INTERFACE": "lo"}


def run(
    scenario: str,
    processes: int,
    folder: Path,
    *options: object,
    hosts: str = "",
    env: Callable[[str], dict[str, str]] = on_host,
) -> list[Any]:
    """What each process returned; -SIGKILL where one was killed. ``hosts``: a letter for
    each process, its host's, of which ``env`` makes its environment; else they are all on one."""
    more = [str(o) for o in options]
    name = WORKERS.get(scenario.split("_")[0], "core_worker.py")
    worker = str(Path(__file__).with_name(name))
    started = [
        subprocess.Popen(
            [
                sys.executable,
                "-X",
                "faulthandler",
                worker,
                scenario,
                str(p),
                str(processes),
                str(folder),
                *more,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env(hosts[p]) if hosts else None,
        )
        for p in range(processes)
    ]
    STARTED.update(child.pid for child in started)
    results: list[Any] = []
    try:
        for child in started:
            out, errors = child.communicate(timeout=90)
            assert child.returncode in (0, -signal.SIGKILL), f"{child.returncode}: {errors}"
            results.append(json.loads(out) if child.returncode == 0 else child.returncode)
    finally:
        for child in started:
            child.kill()
    return results
