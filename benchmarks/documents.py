"""The committed results, and how pages name them."""

from __future__ import annotations

import json
from typing import Any

import results_file

RESULTS = results_file.ROOT / "benchmarks" / "results"


def document(name: str) -> dict[str, Any]:
    """A committed result: its environment and figures."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def source(name: str, up: str = "../..") -> str:
    """Where figures are from, for pages of the guide, or others, from which the root is ``up``."""
    e = document(name)["environment"]
    return (
        f"`benchmarks/denoise/{e['command']}`, torch {e['torch']}, commit {e['commit']}, "
        f"[{name}.json]({up}/benchmarks/results/{name}.json)."
    )
