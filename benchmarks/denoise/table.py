"""Tables of what ``run.py`` measured: one of speeds for each model, one of what lies behind them.

Models need not have been run with the same settings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from markdown_table import markdown

#: What one model's entry in denoise.json is.
Model = dict[str, Any]
#: Titles of one GPU's modes.
MODES = {
    "eager": "one GPU, eager",
    "graph": "one GPU, one CUDA graph",
    "compiled": "one GPU, compiled, one CUDA graph",
}
#: Settings that details are shown of, where they were run.
_DETAILED = ("N=2 S=1 w=1", "N=2 S=1 w=1, compiled", "N=4 S=1 w=1", "N=3 S=2 w=1")


def caption(name: str, document: dict[str, Any]) -> str:
    """Hardware, versions and where the figures and their commands are."""
    e = document["environment"]
    models = document["figures"].values()
    dtypes = ", ".join(dict.fromkeys(m["dtype"] for m in models))
    return (
        f"{len(e['gpus'])} × {e['gpus'][0]}, {dtypes}, guidance on (FLUX has none), DDIM, torch "
        f"{e['torch']}, diffusers {e['diffusers']}. [{name}](../benchmarks/results/{name}) has "
        "each model's commands of `benchmarks/denoise/run.py`.\n\n"
    )


def speeds(figures: dict[str, Model]) -> str:
    """Every model's settings: milliseconds a step, times one GPU in the same mode by the number
    of steps, and the commit that brought the row."""
    return "\n".join(f"### {m['title']}\n\n{_speeds(m)}" for m in figures.values())


def glance(figures: dict[str, Model], rows: dict[str, tuple[str, str]]) -> str:
    """One GPU beside several: a row for each title of ``rows``, of a model's key and a mode."""
    columns = {
        "two GPUs": "N=2 S=1 w=1",
        "four GPUs": "N=4 S=1 w=1",
        "four GPUs, two steps at once": "N=3 S=2 w=1",
    }
    out = [["", "one GPU", *columns]]
    for title, (key, mode) in rows.items():
        model = figures[key]
        suffix = "" if mode == "graph" else f", {mode}"
        cells = [_glance(model.get(name + suffix, {})) for name in columns.values()]
        out.append([title, f"{model[mode]['ms_a_step']['median']:.1f} ms", *cells])
    return markdown(out)


def _glance(entry: dict[str, Any]) -> str:
    if "ms_a_step" not in entry:
        return ""
    ratio = entry[f"speedup_over_{entry['mode']}"]["median"]
    return f"**{ratio:.1f} times**, {entry['ms_a_step']['median']:.1f} ms"


def _speeds(model: Model) -> str:
    settings = [k for k in model if k.startswith("N=") and "generate" not in k]
    order = [k for k in (*MODES, *sorted(settings, key=_place)) if "ms_a_step" in model.get(k, {})]
    own = str(model["steps"])
    lengths = {own} | {k.split()[0] for key in order for k in model[key] if _further(k)}
    steps = sorted(lengths, key=int)
    times = [f"{'times one GPU in ' if n == steps[0] else ''}{n} steps" for n in steps]
    rows = [["", "GPUs", f"ms a step, {own} steps", *times, "commit"]]
    for key in order:
        entry = model[key]
        by_steps = {own: entry} | {k.split()[0]: v for k, v in entry.items() if _further(k)}
        ratios = [_times(by_steps.get(n, {}), entry.get("mode")) for n in steps]
        gpus = str(len(set(entry["devices"]))) if "devices" in entry else "1"
        commits = dict.fromkeys(e["commit"] for e in by_steps.values() if "commit" in e)
        ms = f"{entry['ms_a_step']['median']:.1f}"
        rows.append([MODES.get(key, key), gpus, ms, *ratios, ", ".join(commits)])
    return markdown(rows)


def _times(entry: dict[str, Any], mode: str | None) -> str:
    ratio = entry.get(f"speedup_over_{mode}")
    return f"{ratio['median']:.2f}" if ratio else ""


def _place(key: str) -> tuple[Any, ...]:
    """Graphs before what is compiled, then by devices and by how far the work is spread."""
    setting, _, compiled = key.partition(", ")
    options = setting.split()[3:]
    n, s, w = (int(word.split("=")[1]) for word in setting.split()[:3])
    return bool(compiled), (n + s - 1) * (2 if "split" in options else 1), n, s, options, w


def _further(key: str) -> bool:
    """Whether what stands under a key is of loops of another length."""
    return key.endswith(" steps")


def details(figures: dict[str, Model]) -> str:
    """What lies behind a few of the settings: a column a model."""
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


def rows(document: dict[str, Any]) -> str:
    """What of each denoiser no step computes: how many nodes, and what their values take."""
    heads = ["nodes", "taken out", "values in a row", "its KiB", "in two components, KiB of each"]
    table = [["", *heads]]
    for model in document["figures"].values():
        one, two = model["N=1"], model["N=2"]
        halves = " + ".join(f"{n / 1024:.0f}" for n in two["nbytes"])
        size = f"{one['nbytes'][0] / 1024:.0f}"
        cells = (one["nodes"], one["taken"], one["values"][0], size, halves)
        table.append([model["title"], *map(str, cells)])
    return markdown(table)


def links(figures: dict[str, Model], said: str = "") -> str:
    """Ticks over links, by ``links.py`` or ``links_predicted.py``: a table a model, a row a link,
    the ways of compressing beside each other. ``said``: what their titles end with."""
    return "\n".join(f"### {m['title']}{said}\n\n{_links(m)}" for m in figures.values())


def _links(model: Model) -> str:
    rows = model["rows"].values()
    ways = dict.fromkeys(row["compress"] for row in rows)
    heads = [
        head if way == "none" else f"{way}: {head}"
        for way in ways
        for head in ("ms a tick", "slower", "exposed", "MiB a tick")
    ]
    table = [["", *heads]]
    for title in dict.fromkeys(row["title"] for row in rows):
        cells = [title]
        for way in ways:
            found = [r for r in rows if (r["title"], r["compress"]) == (title, way)]
            cells += _over_link(found[0]) if found else [""] * 4
        table.append(cells)
    return markdown(table)


def _over_link(row: dict[str, Any]) -> list[str]:
    shares = [row.get(name) for name in ("slower_share", "exposed_share")]
    told = ["" if x is None else f"{round(100 * x, 1) + 0.0:.1f} %" for x in shares]
    return [_median(row["tick_ms"], 2), *told, f"{row['exchange_mib']:.1f}"]
