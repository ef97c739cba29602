"""Starts the processes of core_worker.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("core_worker.py")


def run(scenario: str, processes: int, folder: Path, *options: object) -> list[Any]:
    """What each process returned; minus the signal where one was killed."""
    more = [str(o) for o in options]
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKER), scenario, str(p), str(processes), str(folder), *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for p in range(processes)
    ]
    results: list[Any] = []
    try:
        for child in started:
            out, errors = child.communicate(timeout=90)
            assert child.returncode <= 0, errors
            results.append(json.loads(out) if child.returncode == 0 else child.returncode)
    finally:
        for child in started:
            child.kill()
    return results
