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


#: Settings that details are shown of, where they were run.
_DETAILED = ("N=2 S=1 w=1", "N=2 S=1 w=1, compiled", "N=4 S=1 w=1", "N=3 S=2 w=1")


def measured(figures: dict[str, Model]) -> str:
    """One GPU and every setting: milliseconds a step, and times the speed of one GPU in the same
    mode; loops of other lengths; then what lies behind a few of the settings."""
    return "\n".join(filter(None, (_speeds(figures), _lengths(figures), _details(figures))))


def _speeds(figures: dict[str, Model]) -> str:
    models = list(figures.values())
    rows = [["ms a step, **times one GPU**", "GPUs", *(m["title"] for m in models)]]
    rows.append(["steps, rounds at least", "", *(f"{m['steps']}, {m['rounds']}" for m in models)])
    ways = {"eager": "one GPU, eager"} | {k: f"one GPU, {title}" for k, title in MODES.items()}
    settings = dict.fromkeys(k for m in models for k in m if k.startswith("N="))
    for key in (*ways, *sorted(settings, key=_place)):
        entries = [m.get(key, {}) for m in models]
        if not any("ms_a_step" in e for e in entries):
            continue
        gpus = {str(len(set(e["devices"]))) for e in entries if "devices" in e} or {"1"}
        rows.append([ways.get(key, key), ", ".join(sorted(gpus)), *map(_speed, entries)])
    return markdown(rows)


def _place(key: str) -> tuple[Any, ...]:
    """Graphs before what is compiled, then by devices and by how far the work is spread."""
    setting, _, compiled = key.partition(", ")
    options = setting.split()[3:]
    n, s, w = (int(word.split("=")[1]) for word in setting.split()[:3])
    return bool(compiled), (n + s - 1) * (2 if "split" in options else 1), n, s, options, w


def _speed(entry: dict[str, Any]) -> str:
    if "ms_a_step" not in entry:
        return ""
    ratio = entry.get(f"speedup_over_{entry.get('mode')}")
    times = f", **{ratio['median']:.2f}**" if ratio else ""
    return f"{entry['ms_a_step']['median']:.1f}{times}"


def _lengths(figures: dict[str, Model]) -> str:
    """Times one GPU in loops of other lengths, of the settings that were run with them."""
    models = list(figures.values())
    settings = dict.fromkeys(k for m in models for k in m if k.startswith("N="))
    own = {str(m["steps"]) for m in models}
    lengths = {
        k.split()[0] for m in models for e in map(m.get, settings) for k in e or () if _further(k)
    }
    steps = sorted(lengths | own, key=int)
    title = f"times one GPU in {', '.join(steps)} steps (–: not run)"
    rows = [[title, *(m["title"] for m in models)]]
    for key in sorted(settings, key=_place):
        entries = [m.get(key, {}) for m in models]
        if any(_further(k) for e in entries for k in e):
            rows.append([key, *(_over(m, e, steps) for m, e in zip(models, entries, strict=True))])
    return markdown(rows) if rows[1:] else ""


def _further(key: str) -> bool:
    """Whether what stands under a key is of loops of another length."""
    return key.endswith(" steps")


def _over(model: Model, entry: dict[str, Any], steps: list[str]) -> str:
    of = {str(model["steps"]): entry} | {k.split()[0]: v for k, v in entry.items() if _further(k)}
    if len(of) < 2:
        return ""
    ratios = [of.get(n, {}).get(f"speedup_over_{entry.get('mode')}") for n in steps]
    return ", ".join(f"{r['median']:.2f}" if r else "–" for r in ratios)


def _details(figures: dict[str, Model]) -> str:
    models = list(figures.values())
    rows = [["", *(m["title"] for m in models)]]
    for key in _DETAILED:
        entries = [m.get(key, {}) for m in models]
        if any("ms_a_step" in e for e in entries):
            rows.append([f"**{key}**", *("" for _ in models)])
            efficiencies = [_efficiency(m, key) for m in models]
            if any(efficiencies):
                rows.append(["efficiency of a steady tick", *efficiencies])
            for name, cell in _DETAILS.items():
                cells = [_cell(cell, e) for e in entries]
                if any(cells):
                    rows.append([name, *cells])
    eager = [_cell(_memory, m["eager"]) for m in models]
    return markdown([*rows, ["**one GPU, eager**: memory, MiB", *eager]])


def _efficiency(model: Model, key: str) -> str:
    """One GPU's step over N·S times that of a steady tick.

    From loops of two lengths, if there are any. Else at least so much: what a tick takes follows
    from the loops with 1 and 9 exact steps, which take the same in both, but with it a share of
    what a generation takes once.
    """
    few, many = (model.get(key.replace("w=1", f"w={w}")) for w in (1, 9))
    if few is None or "ms_a_step" not in few:
        return ""
    if "steady" in few:
        return _ratio(few["steady"]["efficiency"], digits=3)
    if many is None or few.get("shared_gpus"):
        return ""
    tick = (9 * few["ms_a_step"]["median"] - many["ms_a_step"]["median"]) / 8
    n, s = (int(word.split("=")[1]) for word in key.split()[:2])
    return f"≥ {model[few['mode']]['ms_a_step']['median'] / (n * s * tick):.3f}"


_DETAILS: dict[str, Callable[[dict[str, Any]], str]] = {
    "times eager's speed": lambda e: _ratio(e["speedup_over_eager"]),
    "exposed exchange, ms a tick": lambda e: _median(e["exposed_ms_per_tick"], 3),
    "distance of the final latents to eager's": lambda e: f"{e['distance_to_eager']:.4f}",
    "components alone, ms": lambda e: ", ".join(f"{t:.2f}" for t in e["component_ms_alone"]),
    "one GPU's share over the slowest of them": lambda e: f"{e['efficiency_alone']:.3f}",
    "exchange, MiB a tick": lambda e: f"{e['exchange_mib_per_tick']:.1f}",
    "GMACs a step by GPU": lambda e: ", ".join(f"{g:.0f}" for g in e["gmacs_per_step_by_rank"]),
    "preparation, s": lambda e: f"{e['prepare_s'] + e['first_generation_s']:.0f}",
    "memory by GPU, MiB": lambda e: _memory(e),
}


def _cell(cell: Callable[[dict[str, Any]], str], entry: dict[str, Any]) -> str:
    try:
        return cell(entry)
    except KeyError:  # not run, or by a version that did not report it
        return ""


def _median(spread: dict[str, float], digits: int = 1) -> str:
    return f"{spread['median']:.{digits}f}"


def _ratio(spread: dict[str, float], digits: int = 2) -> str:
    low, high = (f"{spread[k]:.{digits}f}" for k in ("min", "max"))
    return f"{spread['median']:.{digits}f}" + (f" ({low} to {high})" if low != high else "")


def _memory(entry: dict[str, Any]) -> str:
    # What was taken from the device: weights, activations, graphs, mailboxes, torch's cache.
    return ", ".join(f"{mib:.0f}" for mib in entry["memory_mib"]["device"] if mib)
