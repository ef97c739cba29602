"""The README's tables of what ``run.py`` measured: a column a model, a row a way and figure.

Models need not have been run with the same settings: a cell whose model lacks it stays empty.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from markdown_table import markdown

#: What one model's entry in denoise.json is.
Model = dict[str, Any]
#: Titles of one GPU's modes.
MODES = {"graph": "one CUDA graph", "compiled": "compiled, one CUDA graph"}


def caption(name: str, document: dict[str, Any]) -> str:
    """Hardware, versions and where the figures and their commands are."""
    e = document["environment"]
    models = document["figures"].values()
    dtypes = ", ".join(dict.fromkeys(m["dtype"] for m in models))
    return (
        f"{len(e['gpus'])} × {e['gpus'][0]}, {dtypes}, guidance on, DDIM, the whole loop; medians; "
        f"torch {e['torch']}, diffusers {e['diffusers']}. "
        f"[{name}](benchmarks/results/{name}) has each column's command of "
        "`benchmarks/denoise/run.py`.\n\n"
    )


def measured(figures: dict[str, Model]) -> str:
    """One GPU and asyncdiff with each setting."""
    models = list(figures.values())
    rows = [["", *(m["title"] for m in models)]]

    def row(name: str, cell: Callable[[Model], str]) -> None:
        cells = [_cell(cell, m) for m in models]
        if any(cells):
            rows.append([name, *cells])

    row("steps, rounds", lambda m: f"{m['steps']}, {m['rounds']}")
    row("one GPU, eager, ms a step", lambda m: _median(m["eager"]["ms_a_step"]))
    for mode, title in MODES.items():
        row(f"one GPU, {title}, ms a step", lambda m, k=mode: _median(m[k]["ms_a_step"]))
    shown: set[tuple[str, ...]] = set()
    for key in dict.fromkeys(k for m in models for k in m if k.startswith("N=")):
        first = next(m[key] for m in models if key in m)
        team = _team(key, first)
        cells = _asynchronous(key, first) | ({} if team in shown else _OF_TEAM)
        shown.add(team)
        for name, cell in cells.items():
            row(name, lambda m, c=cell, k=key: c(m[k]))
    row("memory of the eager denoiser, MiB", lambda m: _memory(m["eager"]))
    return markdown(rows)


def _team(key: str, first: Model) -> tuple[str, ...]:
    """What decides about components, exchange and memory; exact steps do not."""
    words = key.split(",")[0].split()
    kept = [w for w in words if w.split("=")[0] in ("N", "S", "delay", "waves", "split")]
    return (*kept, first.get("mode", "graph"))


def _asynchronous(key: str, first: Model) -> dict[str, Callable[[Model], str]]:
    """The rows of one setting."""
    where = "ranks sharing the GPU" if first["shared_gpus"] else "a GPU for each rank"
    mode = first.get("mode", "graph")
    return {
        f"asyncdiff {key}, {where}, ms a step": lambda s: _median(s["ms_a_step"]),
        f"— times the speed of one GPU, {MODES.get(mode, mode)}": lambda s: _ratio(
            s[f"speedup_over_{mode}"]
        ),
        "— times eager's speed": lambda s: _ratio(s["speedup_over_eager"]),
        "— exposed exchange, ms a tick": lambda s: _median(s["exposed_ms_per_tick"], 3),
        "— distance of the final latents to eager's": lambda s: f"{s['distance_to_eager']:.4f}",
    }


def predicted(figures: dict[str, Model]) -> str:
    """Speed-ups over one GPU that plans promise, from components timed alone; "" without any."""
    models = [m for m in figures.values() if "predicted" in m]
    rows = [["predicted", "GPUs", *(m["title"] for m in models)]]
    for key in dict.fromkeys(k for m in models for k in m["predicted"]["rows"]):
        found = [m["predicted"]["rows"].get(key) for m in models]
        gpus = next(r["gpus"] for r in found if r is not None)
        cells = [f"{r['speedup_over_one_gpu']:.2f}" if r is not None else "" for r in found]
        rows.append([key, str(gpus), *cells])
    return markdown(rows) if models else ""


#: Rows that settings have in common where only their exact steps differ.
_OF_TEAM: dict[str, Callable[[Model], str]] = {
    "— its components alone, ms": lambda s: " + ".join(f"{t:.2f}" for t in s["component_ms_alone"]),
    "— one GPU's share over the slowest of them": lambda s: f"{s['efficiency_alone']:.3f}",
    "— exchange, MiB a tick": lambda s: f"{s['exchange_mib_per_tick']:.1f}",
    "— preparation, s": lambda s: f"{s['prepare_s'] + s['first_generation_s']:.0f}",
    "— memory by GPU, MiB": lambda s: _memory(s),
}


def _cell(cell: Callable[[Model], str], model: Model) -> str:
    try:
        return cell(model)
    except KeyError:  # not run, or by a version that did not report it
        return ""


def _median(spread: dict[str, float], digits: int = 1) -> str:
    return f"{spread['median']:.{digits}f}"


def _ratio(spread: dict[str, float]) -> str:
    return f"**{spread['median']:.2f}** ({spread['min']:.2f} to {spread['max']:.2f})"


def _memory(entry: dict[str, Any]) -> str:
    # What was taken from the device: weights, activations, graphs, mailboxes, torch's cache.
    return ", ".join(f"{mib:.0f}" for mib in entry["memory_mib"]["device"] if mib)
