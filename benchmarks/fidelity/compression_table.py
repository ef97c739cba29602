"""Tables of ``compression.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fidelity.rows import run_of
from markdown_table import markdown

#: Models as they are called here.
_MODELS = {"unet": "UNet", "transformer": "transformer"}
#: What is shown in a table of its own: settings, and what lies behind them.
_SETTINGS = ("as it is", "fp8", "int8")


def table(folder: Path) -> str:
    """PSNR in dB, and how much of it codes cost."""
    path = folder / "fidelity_compression.json"
    if not path.exists():
        return "Not measured yet.\n"
    document = json.loads(path.read_text())
    rows, e = document["figures"]["rows"], document["environment"]
    pictures = document["figures"]["settings"]["pictures"]
    head = (
        f"{pictures} pictures a row, drawn on the CPU, float32, torch {e['torch']}, commit "
        f"{e['commit']}. `benchmarks/fidelity/{e['command']}`, "
        f"[{path.name}](../benchmarks/results/{path.name}).\n\n"
    )
    others = [w for w in dict.fromkeys(r["way"] for r in rows) if w not in _SETTINGS]
    behind = _table(rows, others) if others else ""
    return head + _table(rows, list(_SETTINGS[1:])) + (f"\n{behind}" if behind else "")


def _table(rows: list[dict[str, Any]], ways: list[str]) -> str:
    by_run: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        run = _MODELS[row["model"]], str(run_of(row))
        by_run.setdefault(run, {})[row["way"]] = row["psnr_db"]
    table = [["", _SETTINGS[0], *ways]]
    for (model, run), psnr in by_run.items():
        if not set(ways) & set(psnr):
            continue
        plain = psnr[_SETTINGS[0]]
        cells = [f"{psnr[w]:.2f} ({psnr[w] - plain:+.2f})" if w in psnr else "" for w in ways]
        table.append([f"{model}: {run}", f"{plain:.2f}", *cells])
    return markdown(table)
