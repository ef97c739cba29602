"""What processes that tests start have in common."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncdiff_core as core


def meet(folder: Path, process: int, processes: int) -> core.SocketRendezvous:
    return core.SocketRendezvous(
        str(folder / "meet"), process, processes, authkey=b"test", timeout=30
    )


def main(scenarios: dict[str, Callable[..., Any]]) -> None:
    """Run the scenario that the command line names, and print what it returns as a line of JSON.

    python FILE SCENARIO PROCESS PROCESSES FOLDER [OPTION ...]
    """
    scenario, process, processes, folder, *more = sys.argv[1:]
    options = [int(x) if x.isdigit() else x for x in more]
    print(json.dumps(scenarios[scenario](int(process), int(processes), Path(folder), *options)))
