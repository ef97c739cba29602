"""Results of ``run.py`` as they are read: a file for each model, which need not be there yet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from results_file import OF_THE_RUN

Row = dict[str, Any]

#: The files that there may be, in the order in which they are shown: by model, its title.
TITLES = {
    "unet": "The UNet of varied pictures",
    "transformer": "The transformer of varied pictures",
    "emoji": "The shipped model, which knows its pictures by heart",
}
SAMPLERS = {"ddim": "DDIM", "dpm": "DPM-Solver++", "euler": "Euler", "flow": "Euler, flow"}


class Run(NamedTuple):
    """What rows are compared within: beside the same plain pictures."""

    sampler: str
    steps: int
    guidance: float

    def __str__(self) -> str:
        how = f"guidance {self.guidance:g}" if self.guidance > 1 else "without guidance"
        return f"{SAMPLERS[self.sampler]}, {self.steps} steps, {how}"


def run_of(row: Row) -> Run:
    """The run that a row belongs to."""
    return Run(row["sampler"], row["steps"], row["guidance"])


def by_run(rows: Sequence[Row]) -> dict[Run, list[Row]]:
    """Rows by the run that they belong to, in the order of their first rows."""
    found: dict[Run, list[Row]] = {}
    for row in rows:
        found.setdefault(run_of(row), []).append(row)
    return found


def read(path: Path) -> dict[str, Any]:
    """A document of results, of earlier ones as later ones are: a guidance of all rows becomes each
    row's, and ``exact_mode`` was called ``warmup_mode``."""
    document: dict[str, Any] = json.loads(path.read_text())
    figures = document["figures"]
    if "guidance" in figures["settings"]:
        guidance = figures["settings"].pop("guidance")
        for row in figures["rows"]:
            row.setdefault("guidance", guidance)
    for row in figures["rows"]:
        settings = row.get("settings") or {}
        if "warmup_mode" in settings:
            settings["exact_mode"] = settings.pop("warmup_mode")
    return document


def together(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One document of several runs' rows, by run. Raises ValueError where they are of different
    machines, versions or settings."""
    first = parts[0]
    rows: list[Row] = []
    for part in parts:
        for what in ("environment", "figures"):
            mine, firsts = ({**d[what]} for d in (part, first))
            for key in ("rows", "links", *OF_THE_RUN):
                mine.pop(key, None)
                firsts.pop(key, None)
            if mine != firsts:
                raise ValueError(f"runs of different {what}: {mine} and {firsts}")
        rows += part["figures"]["rows"]
    runs = sorted(by_run(rows).items(), key=lambda item: _order(item[0]))
    environment = {**first["environment"], "command": f"run.py, {len(parts)} runs"}
    figures = {**first["figures"], "rows": [row for _, mine in runs for row in mine]}
    return {**first, "environment": environment, "figures": figures}


def _order(run: Run) -> tuple[int, int, float]:
    """By sampler, then the most steps first."""
    return list(SAMPLERS).index(run.sampler), -run.steps, run.guidance


def documents(folder: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Model, path and document of those that are there."""
    for model in TITLES:
        path = folder / f"fidelity_{model}.json"
        if path.exists():
            yield model, path, read(path)
