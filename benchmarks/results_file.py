"""Where results go, and what is written beside them: hardware, versions, command, time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# This checkout's own, whatever is installed.
sys.path.insert(0, str(Path(__file__).with_name("exchange")))

from asyncdiff_bench.results import commit, environment, write

__all__ = ["ROOT", "commit", "continued", "environment", "write"]

ROOT = Path(__file__).resolve().parents[1]

#: What differs between runs whose figures may stand in one file.
OF_THE_RUN = ("command", "commit", "date")


def continued(path: Path) -> dict[str, Any]:
    """The figures of an earlier run on the same hardware with the same versions; else none."""
    if not path.exists():
        return {}
    document = json.loads(path.read_text())
    now, then = (
        {k: v for k, v in e.items() if k not in OF_THE_RUN}
        for e in (environment(), document["environment"])
    )
    same = json.loads(json.dumps(now)) == then
    if not same:
        print(f"{path} is of another machine or other versions: it is written anew")
    figures: dict[str, Any] = document["figures"] if same else {}
    return figures
