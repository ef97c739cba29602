"""Write the README's tables from the committed results.

python benchmarks/tables.py            # rewrites README.md between its markers
python benchmarks/tables.py --check    # exit code 1 if that would change it
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asyncdiff.bench.figures import Figure, Results
from asyncdiff.bench.table import digits, title_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"


def main() -> None:
    text = old = README.read_text()
    for name, table in TABLES.items():
        pattern = rf"<!-- results:{name} -->\n.*?<!-- /results -->"
        new = f"<!-- results:{name} -->\n{table()}<!-- /results -->"
        text, count = re.subn(pattern, lambda _, new=new: new, text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"README.md has {count} places for results:{name}, not one")
    if "--check" in sys.argv[1:]:
        raise SystemExit("README.md does not show the committed results" if text != old else 0)
    README.write_text(text)


def denoise() -> str:
    """All files ``denoise_*.json``, one table each."""
    parts = []
    for path in sorted(RESULTS.glob("denoise_*.json"), reverse=True):
        document = json.loads(path.read_text())
        parts.append(_caption(path, document) + _denoise_table(document["figures"]))
    return "\n".join(parts) if parts else "Nothing was measured yet.\n"


def exchange() -> str:
    """All files ``exchange_*.json``: one way by size, then what else was measured of each way."""
    parts = []
    for path in sorted(RESULTS.glob("exchange_*.json"), reverse=True):
        document = json.loads(path.read_text())
        results = Results.from_dict(document["figures"])
        e = document["environment"]
        gpus = f"{len(e['gpus'])} × {e['gpus'][0]}" if e["gpus"] else "CPU"
        rounds = max((f.value.rounds for f in results.figures), default=0)
        parts.append(
            f"{gpus}, ranks on {', '.join(results.devices)}; medians of {rounds} rounds; torch "
            f"{e['torch']}. `benchmarks/exchange/{e['command']}`, "
            f"[{path.name}](benchmarks/results/{path.name}); [what is what](docs/metrics.md).\n\n"
            + "\n".join(filter(None, (_one_way(results), _other(results))))
        )
    return "\n".join(parts)


def _one_way(results: Results) -> str:
    """Latency in a CUDA graph: a row a way, a column a bundle."""
    figures = [f for f in results.figures if f.metric == "one_way" and f.launch == "graph"]
    names = list(dict.fromkeys(f.payload for f in figures))
    rows = [["one way in a CUDA graph, µs", *names]]
    for way in dict.fromkeys(f.way for f in figures):
        found = {f.payload: digits(f.value.median) for f in figures if f.way == way}
        rows.append([title_of(way), *(found.get(name, "") for name in names)])
    return _markdown(rows) if figures else ""


def _other(results: Results) -> str:
    """The figure of each way's largest bundle in the other cases: a row a way."""
    columns: dict[str, Callable[[Figure], str | None]] = {
        "GB/s, one direction": lambda f: _rate(f, "bandwidth"),
        "both directions": lambda f: _rate(f, "bidirectional"),
        "to several": lambda f: _rate(f, "fan-out"),
        "CPU of a put of 64 KB, µs": lambda f: (
            digits(f.value.median) if (f.case, f.payload) == ("enqueue", "64K") else None
        ),
        "matmuls slower, SD 2.1's bundle a tick": lambda f: (
            f"{f.value.median:.1f} %"
            if (f.metric, f.payload) == ("compute_slower", "sd21-N2")
            and (f.details["side"], f.details["load"]) == ("sender", "a bundle a tick")
            else None
        ),
    }
    rows = [["", *columns]]
    figures = sorted(results.figures, key=lambda f: f.nbytes)
    for way in dict.fromkeys(f.way for f in results.figures):
        cells = []
        for cell in columns.values():
            found = [c for f in figures if f.way == way and (c := cell(f)) is not None]
            cells.append(found[-1] if found else "")
        if any(cells):
            rows.append([title_of(way), *cells])
    return _markdown(rows) if len(rows) > 1 else ""


#: Rows of the fidelity benchmark that the README shows: those that begin so, in this order.
_SHOWN = (
    "asyncdiff N=",
    "wavefront N=",
    "wavefront, order 0 N=",
    "wavefront, drained N=",
    "fewer",
    "guidance",
    "Faster Diffusion, 4 devices, the paper's keys",
    "Faster Diffusion, 2 devices, every",
    "Faster Diffusion, 4 devices, every",
    "DistriFusion, 2 patches, 1 ",
    "DistriFusion, 4 patches, 1 ",
)


def fidelity() -> str:
    """fidelity.json: a table for each sampler, of exact ends where a row has some."""
    path = RESULTS / "fidelity.json"
    if not path.exists():
        return "Nothing was measured yet.\n"
    document = json.loads(path.read_text())
    e, settings = document["environment"], document["figures"]["settings"]
    on = e["gpus"][0] if e["gpus"] else "CPU"
    parts = [
        f"{len(settings['prompts'])} prompts, guidance {settings['guidance']:g}, drawn on {on}, "
        f"torch {e['torch']}. `benchmarks/fidelity/{e['command']}`, "
        f"[{path.name}](benchmarks/results/{path.name}).\n"
    ]
    rows = document["figures"]["rows"]
    for sampler, steps in dict.fromkeys((r["sampler"], r["steps"]) for r in rows):
        mine = [r for r in rows if (r["sampler"], r["steps"]) == (sampler, steps)]
        parts.append(f"{sampler}, {steps} steps:\n\n" + _fidelity_table(mine))
    return "\n".join(parts)


def _fidelity_table(rows: list[dict[str, Any]]) -> str:
    ends = ("w=1", "w=5", "w=1 tail=1", "w=1 tail=4")
    table = [["", "devices", *(f"{end}: speed-up, PSNR dB" for end in ends)]]
    curves: dict[str, dict[str, dict[str, Any]]] = {}
    place = {r["method"]: [r["method"].startswith(s) for s in _SHOWN] for r in rows}
    for row in sorted(rows, key=lambda r: place[r["method"]], reverse=True):
        name, _, end = row["method"].partition(" w=")
        curves.setdefault(name, {})[f"w={end}" if end else ends[0]] = row

    def cell(row: dict[str, Any] | None) -> str:
        if row is None:
            return ""
        psnr = row["psnr_db"]
        return f"{row['speedup']:.2f}, " + ("exact" if psnr > 90 else f"{psnr:.1f}")

    for name, by_end in curves.items():
        if name.startswith(_SHOWN):
            devices = str(next(iter(by_end.values()))["devices"])
            table.append([name, devices, *(cell(by_end.get(end)) for end in ends)])
    return _markdown(table)


def _rate(figure: Figure, case: str) -> str | None:
    rate = figure.gb_per_s
    return digits(rate) if figure.case == case and rate is not None else None


def _markdown(rows: list[list[str]]) -> str:
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(r)} |\n" for r in rows)


def _caption(path: Path, document: dict[str, Any]) -> str:
    e = document["environment"]
    gpus = f"{len(e['gpus'])} × {e['gpus'][0]}"
    first = next(iter(document["figures"].values()))
    return (
        f"{gpus}, {first['dtype']}, guidance on, {first['steps']} DDIM steps, the whole loop; "
        f"medians of {first['rounds']} rounds; torch {e['torch']}, diffusers {e['diffusers']}. "
        f"`benchmarks/denoise/{e['command']}`, "
        f"[{path.name}](benchmarks/results/{path.name}).\n\n"
    )


def _denoise_table(figures: dict[str, Any]) -> str:
    titles = [m["title"] for m in figures.values()]
    rows: list[list[str]] = [["", *titles]]

    def row(name: str, cell: Callable[[dict[str, Any]], str]) -> None:
        rows.append([name, *(cell(m) for m in figures.values())])

    row("one GPU, eager, ms a step", lambda m: _median(m["eager"]["ms_a_step"]))
    first = next(iter(figures.values()))
    modes = {"graph": "one CUDA graph", "compiled": "compiled, one CUDA graph"}
    for mode in (m for m in modes if m in first):
        name = f"one GPU, {modes[mode]}, ms a step"
        row(name, lambda m, k=mode: _median(m[k]["ms_a_step"]))
    schedules = [k for k in first if k.startswith("N=")]
    for key in schedules:
        shared, mode = first[key]["shared_gpus"], first[key].get("mode", "graph")
        where = "ranks sharing the GPU" if shared else "a GPU for each rank"
        row(f"asyncdiff {key}, {where}, ms a step", lambda m, k=key: _median(m[k]["ms_a_step"]))
        row(
            "— its components alone, ms",
            lambda m, k=key: " + ".join(f"{t:.2f}" for t in m[k]["component_ms_alone"]),
        )
        if "efficiency_alone" in first[key]:
            name = "— one GPU's share over the slowest of them"
            row(name, lambda m, k=key: f"{m[k]['efficiency_alone']:.3f}")
        if not shared:
            row(
                f"— times the speed of one GPU, {modes[mode]}",
                lambda m, k=key, b=mode: _ratio(m[k][f"speedup_over_{b}"]),
            )
            row("— times eager's speed", lambda m, k=key: _ratio(m[k]["speedup_over_eager"]))
        row("— exchange, MiB a tick", lambda m, k=key: f"{m[k]['exchange_mib_per_tick']:.1f}")
        row(
            "— exposed exchange, ms a tick",
            lambda m, k=key: _median(m[k]["exposed_ms_per_tick"], 3),
        )
        row("— memory by GPU, MiB", lambda m, k=key: _memory(m[k]))
    row("memory of the eager denoiser, MiB", lambda m: _memory(m["eager"]))
    return _markdown(rows)


def _median(spread: dict[str, float], digits: int = 1) -> str:
    return f"{spread['median']:.{digits}f}"


def _ratio(spread: dict[str, float]) -> str:
    return f"**{spread['median']:.2f}** ({spread['min']:.2f} to {spread['max']:.2f})"


def _memory(entry: dict[str, Any]) -> str:
    # What was taken from the device: weights, activations, graphs, mailboxes, torch's cache.
    return ", ".join(f"{mib:.0f}" for mib in entry["memory_mib"]["device"] if mib)


TABLES = {"denoise": denoise, "exchange": exchange, "fidelity": fidelity}

if __name__ == "__main__":
    main()
