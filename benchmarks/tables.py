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
from denoise import table as denoise_table
from fidelity.rivals import rival
from markdown_table import markdown

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
    """All files ``denoise_*.json``, those of most GPUs first; a model is shown from the first one
    that has it."""
    documents = [
        (p.name, json.loads(p.read_text())) for p in sorted(RESULTS.glob("denoise_*.json"))
    ]
    documents.sort(key=lambda d: len(d[1]["environment"]["gpus"]), reverse=True)
    parts: list[str] = []
    shown: set[str] = set()
    for name, document in documents:
        figures = {k: m for k, m in document["figures"].items() if k not in shown}
        shown |= set(figures)
        if not figures:
            continue
        caption = denoise_table.caption(name, {**document, "figures": figures})
        parts.append(caption + denoise_table.measured(figures))
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
    return markdown(rows) if figures else ""


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
    return markdown(rows) if len(rows) > 1 else ""


#: Rows of the fidelity benchmark that the README shows: those that begin so, in this order.
_SHOWN = (
    "asyncdiff N=",
    "wavefront N=",
    "wavefront, calibrated N=",
    "wavefront, drained N=",
    "wavefront, guidance split N=",
    "wavefront, whole N=",
    "fewer",
    "guidance",
    "Faster Diffusion, 4 devices, the paper's keys",
    "Faster Diffusion, 2 devices, every",
    "Faster Diffusion, 4 devices, every",
    "DistriFusion, 2 patches, 1 ",
    "DistriFusion, 4 patches, 1 ",
    "DistriFusion, 4 patches, 9 ",
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
        f"[{path.name}](benchmarks/results/{path.name}). †: a compared method on no more devices "
        "is at least as fast and closer.\n"
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
        mark = "" if rival(row, rows) is None else " †"
        return f"{row['speedup']:.2f}, " + ("exact" if psnr > 90 else f"{psnr:.1f}{mark}")

    for name, by_end in curves.items():
        if name.startswith(_SHOWN):
            devices = str(next(iter(by_end.values()))["devices"])
            table.append([name, devices, *(cell(by_end.get(end)) for end in ends)])
    return markdown(table)


def _rate(figure: Figure, case: str) -> str | None:
    rate = figure.gb_per_s
    return digits(rate) if figure.case == case and rate is not None else None


TABLES = {"denoise": denoise, "exchange": exchange, "fidelity": fidelity}

if __name__ == "__main__":
    main()
