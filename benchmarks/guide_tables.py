"""What pages of the guide say of runs on two GPUs, and predict: a table each."""

from __future__ import annotations

import statistics
from typing import Any

from denoise import table as denoise_table
from denoise.models import MODELS
from documents import document as _document
from documents import source as _source
from markdown_table import markdown

#: The row of loops whose tokens are shared out.
_TOKENS = "2 GPUs, tokens"
#: What calls of diffusers' Ulysses were timed on.
_CALLS = ("one", "several")


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


def exact() -> str:
    """Two GPUs with every step exact beside two components, by model: times one GPU's speed."""
    table = [["", "how", "every step exact", "two components"]]
    for mode, suffix in (("graph", ""), ("compiled", ", compiled")):
        for key, model in _loops(mode).items():
            split = model.get(f"N=1 S=1 w=1 split{suffix}")
            several = _times_one(model.get(f"N=2 S=1 w=1{suffix}"), mode)
            if split is not None and several:
                title = MODELS[key].title + suffix
                table.append([title, "a condition each", _times_one(split, mode), several])
        shared = _document("sequence_2gpu")["figures"]
        for key, model in shared.items():
            row = model.get({"graph": "graphs", "compiled": "regions"}[mode], {}).get(_TOKENS)
            several = _times_one(_loops(mode).get(key, {}).get(f"N=2 S=1 w=1{suffix}"), mode)
            if row is not None and several:
                times = f"{row['speedup']['median']:.2f}"
                table.append([MODELS[key].title + suffix, "half of the tokens", times, several])
    return markdown(table)


def _loops(mode: str) -> dict[str, dict[str, Any]]:
    """What was measured on two GPUs of loops in a mode, by model."""
    found: dict[str, dict[str, Any]] = {}
    for name in ("denoise_4gpu", "denoise_2gpu"):
        for key, model in _document(name)["figures"].items():
            compiled = key.endswith("-compiled")
            if not compiled or mode == "compiled":
                found[key.removesuffix("-compiled")] = model
    return {key: model for key, model in found.items() if key in MODELS}


def _times_one(entry: dict[str, Any] | None, mode: str) -> str:
    return f"{entry[f'speedup_over_{mode}']['median']:.2f}" if entry else ""


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
