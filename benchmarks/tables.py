"""Write the tables of the README and of pages in docs from the committed results.

python benchmarks/tables.py            # rewrites them between their markers
python benchmarks/tables.py --check    # exit code 1 if that would change anything
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import guide_tables as guide
import results_file
from asyncdiff_bench.figures import Figure, Results
from asyncdiff_bench.table import digits, title_of
from denoise import table as denoise_table
from documents import RESULTS
from documents import document as _document
from documents import source as _source
from fidelity import compression_table
from fidelity import table as fidelity_table
from markdown_table import markdown
from pipelines import table as pipelines_table

ROOT = results_file.ROOT
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "results.md"
QUALITY = ROOT / "docs" / "guide" / "quality.md"
PIPELINE = ROOT / "docs" / "guide" / "pipeline.md"
PREPARATION = ROOT / "docs" / "guide" / "preparation.md"
SEQUENCE = ROOT / "docs" / "guide" / "sequence.md"
SETTINGS = ROOT / "docs" / "guide" / "settings.md"
LINKS = ROOT / "docs" / "guide" / "links.md"
PROCESSES = ROOT / "docs" / "guide" / "processes.md"
COMFYUI = ROOT / "docs" / "guide" / "comfyui.md"
PIPELINES = ROOT / "docs" / "pipelines.md"
#: The README's table: title, key of a model and mode of all runs in a row.
_GLANCE = {
    "SD 1.5, 512²": ("sd15", "graph"),
    "SD 2.1, 768²": ("sd21", "graph"),
    "SDXL, 1024²": ("sdxl", "graph"),
    "SDXL, compiled": ("sdxl", "compiled"),
    "SD3 medium, 1024²": ("sd3", "graph"),
    "FLUX.1-dev, 1024²": ("flux", "graph"),
    "SVD-XT, 25 frames 576×1024": ("svd", "graph"),
    "AnimateDiff, 16 frames 512²": ("animatediff", "graph"),
}


def main() -> None:
    stale = []
    pages = (
        (README, {"glance": glance}),
        (PAGE, TABLES),
        (QUALITY, {"qualities": qualities, "exact": guide.exact}),
        (PIPELINE, {"pictures": guide.pictures}),
        (PREPARATION, {"preparation": guide.preparation, "whole": guide.whole}),
        (SETTINGS, {"unequal": guide.unequal}),
        (
            SEQUENCE,
            {
                "sequence": guide.sequence,
                "shares": guide.shares,
                "ulysses": guide.ulysses,
                "merged": guide.merged,
            },
        ),
        (LINKS, {"links": guide.links}),
        (PROCESSES, {"processes": guide.processes}),
        (COMFYUI, {"comfyui": guide.comfyui}),
        (PIPELINES, {"pipelines": pipelines}),
    )
    for path, tables in pages:
        text = old = path.read_text()
        for name, table in tables.items():
            pattern = rf"<!-- results:{name} -->\n.*?<!-- /results -->"
            new = f"<!-- results:{name} -->\n\n{table()}\n<!-- /results -->"
            text, count = re.subn(pattern, lambda _, new=new: new, text, flags=re.DOTALL)
            if count != 1:
                raise SystemExit(f"{path.name} has {count} places for results:{name}, not one")
        if text != old:
            stale.append(path.name)
        if "--check" not in sys.argv[1:]:
            path.write_text(text)
    if "--check" in sys.argv[1:] and stale:
        raise SystemExit(f"not of the committed results: {', '.join(stale)}")


def _denoise() -> list[tuple[str, dict[str, Any]]]:
    """All files ``denoise_*.json``, those of most GPUs first; a model is in the first one that
    has it."""
    documents = [
        (p.name, json.loads(p.read_text())) for p in sorted(RESULTS.glob("denoise_*.json"))
    ]
    documents.sort(key=lambda d: len(d[1]["environment"]["gpus"]), reverse=True)
    shown: set[str] = set()
    out = []
    for name, document in documents:
        figures = {k: m for k, m in document["figures"].items() if k not in shown}
        shown |= set(figures)
        if figures:
            out.append((name, {**document, "figures": figures}))
    return out


def speeds() -> str:
    """Milliseconds a step, a table a model."""
    return "\n".join(
        denoise_table.caption(name, document) + denoise_table.speeds(document["figures"])
        for name, document in _denoise()
    )


def details() -> str:
    """What lies behind some of the settings."""
    return "\n".join(denoise_table.details(document["figures"]) for _, document in _denoise())


def rows() -> str:
    """What no step computes."""
    return f"{_source('rows', '..')}\n\n{denoise_table.rows(_document('rows'))}"


def pipelines() -> str:
    """What came of the pipelines of diffusers."""
    path = "../benchmarks/results/pipelines.json"
    return f"[pipelines.json]({path}): {pipelines_table.table(_document('pipelines'))}"


def glance() -> str:
    """The README's eight rows."""
    return denoise_table.glance(_denoise()[0][1]["figures"], _GLANCE)


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
            f"{e['torch']}, commit {e.get('commit', 'unknown')}. "
            f"`benchmarks/exchange/{e['command']}`, "
            f"[{path.name}](../benchmarks/results/{path.name}); [what is what](metrics.md).\n\n"
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


def _rate(figure: Figure, case: str) -> str | None:
    rate = figure.gb_per_s
    return digits(rate) if figure.case == case and rate is not None else None


def fidelity() -> str:
    """What the pictures keep, each way."""
    return fidelity_table.kept(RESULTS)


def qualities() -> str:
    """What each quality picks and keeps. Its page lies a folder deeper than the others."""
    return fidelity_table.qualities(RESULTS).replace("](../", "](../../")


def few_steps() -> str:
    """The same with a dozen steps or fewer."""
    return fidelity_table.few_steps(RESULTS)


def delays() -> str:
    """What the delay of waves does."""
    return fidelity_table.delays(RESULTS)


def compression() -> str:
    """What compressing what crosses costs: a row a run, a column a way."""
    return compression_table.table(RESULTS)


TABLES = {
    "speeds": speeds,
    "details": details,
    "rows": rows,
    "exchange": exchange,
    "fidelity": fidelity,
    "few-steps": few_steps,
    "delays": delays,
    "compression": compression,
}

if __name__ == "__main__":
    main()
