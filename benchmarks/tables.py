"""Write the tables of the README and of pages in docs from the committed results.

python benchmarks/tables.py            # rewrites them between their markers
python benchmarks/tables.py --check    # exit code 1 if that would change anything
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from typing import Any

import results_file
from asyncdiff_bench.figures import Figure, Results
from asyncdiff_bench.table import digits, title_of
from denoise import table as denoise_table
from denoise.models import MODELS
from fidelity import compression_table
from fidelity import table as fidelity_table
from markdown_table import markdown
from pipelines import table as pipelines_table

ROOT = results_file.ROOT
RESULTS = ROOT / "benchmarks" / "results"
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
#: What calls of diffusers' Ulysses were timed on.
_CALLS = ("one", "several")

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
        (QUALITY, {"qualities": qualities}),
        (PIPELINE, {"pictures": pictures}),
        (PREPARATION, {"preparation": preparation, "whole": whole}),
        (SETTINGS, {"unequal": unequal}),
        (
            SEQUENCE,
            {"sequence": sequence, "shares": shares, "ulysses": ulysses, "merged": merged},
        ),
        (LINKS, {"links": links}),
        (PROCESSES, {"processes": processes}),
        (COMFYUI, {"comfyui": comfyui}),
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


def preparation() -> str:
    """Seconds of a first generation, with nothing kept on the disk and with all."""
    document = _document("compile_2gpu")
    phases = ("export", "measure", "build", "compile")
    caches = {"cold": "nothing kept", "warm": "all kept"}
    ways = {"graphs": "", "regions": ", compiled", "whole": ", compiled whole"}
    table = [["", "kept on the disk", "all, s", *phases, "ms a step"]]
    for model in document["figures"].values():
        for way, name in ((w, n) for w, n in ways.items() if w in model["ways"]):
            for cache, said in caches.items():
                row = model["ways"][way].get(cache)
                if row is None or "total_s" not in row:
                    continue
                spent = [f"{row['phases_s'].get(phase, 0.0):.1f}" for phase in phases]
                figures = [f"{row['total_s']:.1f}", *spent, f"{row['ms_a_step']['median']:.1f}"]
                table.append([f"{model['title']}{name}", said, *figures])
                new = row.get("new_size")
                if new is not None:
                    spent = [f"{new['phases_s'].get(phase, 0.0):.1f}" for phase in phases]
                    size = f"then {new['height']}×{new['width']}{name}"
                    table.append([size, said, f"{new['total_s']:.1f}", *spent, ""])
    return markdown(table)


def whole() -> str:
    """What parts take that are compiled by regions, and as wholes."""
    table = [["parts alone, ms", "by regions", "whole", "regions over whole", "pieces compiled"]]
    names = ("whole_2gpu", "whole_1gpu")
    for model in (m for name in names for m in _document(name)["figures"].values()):
        regions, all_of_it = (model["ways"][way]["cold"] for way in ("regions", "whole"))
        alone = [
            ", ".join(f"{t:.1f}" for t in w["component_ms_alone"]) for w in (regions, all_of_it)
        ]
        pieces = f"{regions['given_to_inductor']} of {regions['pieces']}"
        ratio = f"{model['regions_over_whole']['alone_cold']:.3f}"
        table.append([model["title"], *alone, ratio, pieces])
    sources = " ".join(_source(name) for name in names)
    return f"{sources}\n\n{markdown(table)}"


def unequal() -> str:
    """Two GPUs of which another process slows one down."""
    table = [["", "speeds it was cut for", "ms a step", "of the sum of both speeds"]]
    for key, model in _document("unequal_2gpu")["figures"].items():
        name, *run = key.split(", ")
        title = ", ".join([MODELS[name].title, *run])
        share = f"{100 * model['share_of_first']:.0f} %"
        for way, row in ((w, r) for w, r in model.items() if isinstance(r, dict) and "cuts" in r):
            slower = "" if way == "both alone" else f", one at {share}"
            speeds = ", ".join(f"{s:.2f}" for s in row["speeds"] or [1.0, 1.0])
            figures = [f"{row['step_ms']:.1f}", f"{row['of_ideal']:.3f}"]
            table.append([f"{title}: {way}{slower}", speeds, *figures])
    return f"{_source('unequal_2gpu')}\n\n{markdown(table)}"


def sequence() -> str:
    """Exact steps whose tokens are shared out, beside the same denoiser on one GPU."""
    document = _document("sequence_2gpu")
    modes = {"graphs": "", "regions": ", compiled"}
    table = [["", "ms a step", "times one GPU", "shares alone, ms", "MiB of both a step"]]
    for model in document["figures"].values():
        for mode, rows in ((m, model[m]) for m in modes if m in model):
            for name, row in rows.items():
                cells = [f"{model['title']}{modes[mode]}: {name}"]
                cells.append(f"{row['ms_a_step']['median']:.1f}")
                if name == "one GPU":
                    table.append([*cells, "", "", ""])
                    continue
                cells.append("{median:.3f} ({min:.3f} to {max:.3f})".format(**row["speedup"]))
                cells.append(", ".join(map("{:.1f}".format, row["rank_ms_alone"])))
                table.append([*cells, f"{row['exchange_mib_per_step']:.0f}"])
    return markdown(table)


def shares() -> str:
    """What shares of the tokens take alone, all on one GPU."""
    document = _document("shares_1gpu")
    table = [["each share alone, ms", "all tokens", "shares"]]
    for model in document["figures"].values():
        rows = dict(model["regions"])
        (one,) = rows.pop("one GPU")["rank_ms_alone"]
        for name, row in rows.items():
            title = name.replace("GPUs, tokens", "devices")
            alone = ", ".join(f"{t:.1f}" for t in row["rank_ms_alone"])
            table.append([f"{model['title']}, compiled: {title}", f"{one:.1f}", alone])
    return f"{_source('shares_1gpu')}\n\n{markdown(table)}"


def links() -> str:
    """Ticks over simulated links, measured and, of all models and links, predicted."""
    measured, predicted = _document("links_2gpu"), _document("links_predicted")
    gpus = measured["environment"]["gpus"]
    return (
        f"Measured on {len(gpus)} × {gpus[0]}, over simulated links: {_source('links_2gpu')}\n\n"
        + denoise_table.links(measured["figures"])
        + f"\n**Predicted**, not measured: {_source('links_predicted')}\n\n"
        + denoise_table.links(predicted["figures"], ", predicted")
    )


def processes() -> str:
    """A process for each GPU beside one process for all."""
    table = [["", "processes, ms a loop", "one process", "ratio", "same bits"]]
    modes = {"graph": "", "compiled": ", compiled"}
    for key, row in _document("processes_2gpu")["figures"].items():
        name, *_, mode = key.partition(", ")[0].split()
        title = MODELS[name].title + modes[mode] + (", as on two hosts" if row["hosts"] else "")
        each = [f"{row[key]['median']:.1f}" for key in ("processes_ms", "one_process_ms")]
        table.append([title, *each, f"{row['ratio']:.3f}", "yes" if row["same_bits"] else "no"])
    return f"{_source('processes_2gpu')}\n\n{markdown(table)}"


def comfyui() -> str:
    """ComfyUI's own sampler, plainly and through the node."""
    document = _document("comfyui_2gpu")
    (model,) = document["figures"].values()
    table = [["", "s a run", "times ComfyUI's own", "first run, s", "difference of latents"]]
    for way, row in model["ways"].items():
        took = "{median:.2f} ({min:.2f} to {max:.2f})".format(**row["s"])
        far = f"{row['distance_to_plain']:.0e}" if row["distance_to_plain"] else ""
        table.append([way, took, f"{row['times_plain']:.2f}", f"{row['first_s']:.1f}", far])
    source = _source("comfyui_2gpu").replace("benchmarks/denoise/", "benchmarks/comfyui/")
    return f"{source}\n\n{markdown(table)}"


def ulysses() -> str:
    """diffusers' own sequence parallelism beside one GPU."""
    table = [["", "one GPU, ms a call", "two GPUs", "times one GPU"]]
    for model in _document("ulysses_2gpu")["figures"].values():
        for way in (w for w in ("eager", "compiled") if w in model):
            one, several = (statistics.median(model[way]["ms_a_call"][n]) for n in _CALLS)
            times = f"{model[way]['speedup']:.2f}"
            table.append([f"{model['title']}, {way}", f"{one:.1f}", f"{several:.1f}", times])
    return f"{_source('ulysses_2gpu')}\n\n{markdown(table)}"


def merged() -> str:
    """Attention in two parts, of which the second may arrive later, beside attention at once."""
    table = [["half the queries, all keys", "at once, ms", "in two parts", "merging them"]]
    for name, row in _document("merged_attention")["figures"].items():
        cells = [f"{row[key]:.3f}" for key in ("whole_ms", "halves_ms", "merge_ms")]
        table.append([MODELS[name].title, *cells])
    return f"{_source('merged_attention')}\n\n{markdown(table)}"


def _document(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return document


def _source(name: str, up: str = "../..") -> str:
    """Where figures are from, for pages of the guide, or others, from which the root is ``up``."""
    e = _document(name)["environment"]
    return (
        f"`benchmarks/denoise/{e['command']}`, torch {e['torch']}, commit {e['commit']}, "
        f"[{name}.json]({up}/benchmarks/results/{name}.json)."
    )


def pictures() -> str:
    """Several pictures in turn on all GPUs, beside the same batch on one."""
    document = _document("pictures_2gpu")
    table = [["", "pictures", "one GPU, ms a step", "two GPUs", "times one GPU"]]
    for row in document["figures"]["rows"]:
        one, two = (row["ms_a_step"][way]["median"] for way in ("one", "pipeline"))
        times = "{median:.2f} ({min:.2f} to {max:.2f})".format(**row["times_one_gpu"])
        title = row["title"] + (", compiled" if row["mode"] == "compiled" else "")
        table.append([title, str(row["pictures"]), f"{one:.1f}", f"{two:.1f}", times])
    return markdown(table)


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
