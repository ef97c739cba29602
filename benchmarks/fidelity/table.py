"""Tables of what pictures keep, from the results of ``run.py`` on every model that has some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from asyncdiff.quality import DEFAULT, QUALITIES
from fidelity.rivals import rival
from fidelity.rows import TITLES, Row, Run, by_run, documents
from markdown_table import markdown

#: Rows that are shown: those that begin so, in this order.
_SHOWN = (
    "quality high",
    "quality balanced",
    "quality fast",
    "asyncdiff N=",
    "wavefront N=",
    "wavefront, calibrated N=",
    "wavefront, guidance split N=",
    "fewer",
    "guidance",
    "Faster Diffusion, 4 devices, the paper's keys",
    "Faster Diffusion, 2 devices, every",
    "Faster Diffusion, 4 devices, every",
    "DistriFusion, 2 patches, 1 ",
    "DistriFusion, 4 patches, 1 ",
    "DistriFusion, 4 patches, 9 ",
)
#: Exact steps of the rows that are shown, where they have some.
_ENDS = ("w=1", "w=5", "w=9", "w=1 tail=4")
#: As many steps or fewer are a table of their own.
_FEW = 12
#: Pictures that are closer than this, in dB, differ by rounding.
_EXACT = 90.0
#: N and S of the table of delays.
_SHAPES = ((3, 1), (4, 1), (3, 2))
_NOTHING = "Not measured yet.\n"


def kept(folder: Path) -> str:
    """What each way keeps: a table for each model, sampler and guidance."""

    def of_run(run: Run, rows: list[Row]) -> str:
        table = [["", "devices", "speed-up", "PSNR, dB", "10th percentile", "SSIM"]]
        table += [[r["method"], str(r["devices"]), *_cells(r, rows)] for r in _in_order(rows)]
        return f"{run}:\n\n{markdown(table)}"

    def of_model(rows: list[Row]) -> str:
        runs = by_run(rows).items()
        return "\n".join(of_run(run, mine) for run, mine in runs if _compared(run, mine))

    return _all(folder, of_model)


def qualities(folder: Path) -> str:
    """What each quality keeps, and what the default picks."""

    def of_model(rows: list[Row]) -> str:
        shown = [q for q in reversed(QUALITIES) if q != "exact"]
        measured = "measured on SDXL, SD3, FLUX"
        table = [["", "devices", f'"{DEFAULT}" picks', measured, *(f'"{q}"' for q in shown)]]
        for run, mine in by_run(rows).items():
            for devices in sorted({r["devices"] for r in mine}) if run.steps > _FEW else ():
                names = {q: f"quality {q}, {devices} devices" for q in shown}
                found = {q: r for q in shown for r in mine if r["method"] == names[q]}
                if DEFAULT in found:
                    settings = found[DEFAULT]["settings"]
                    head = [str(run), str(devices), _picked(settings, run.steps)]
                    kept = [_at_speed(found[q], mine) if q in found else "" for q in shown]
                    table.append([*head, _measured(settings), *kept])
        return markdown(table) if len(table) > 1 else ""

    return _all(folder, of_model)


def few_steps(folder: Path) -> str:
    """The same of a dozen steps or fewer, PSNR in dB."""
    columns = {
        f"N={n}: {title}": f"{kind} N={n} S=1 w=1"
        for n in (2, 4)
        for title, kind in (("published", "asyncdiff"), ("waves", "wavefront"))
    } | {
        "N=2: waves, w=5": "wavefront N=2 S=1 w=5",
        "quality balanced, 2 devices": "quality balanced, 2 devices",
        "DistriFusion, 2 patches": "DistriFusion, 2 patches, 1 synchronous",
    }

    def of_model(rows: list[Row]) -> str:
        table = [["PSNR (10th percentile), dB", *columns]]
        runs = [(run, mine) for run, mine in by_run(rows).items() if run.steps <= _FEW]
        for run, mine in sorted(runs, key=lambda r: (r[0].sampler, -r[0].guidance, -r[0].steps)):
            table.append([str(run), *(_short(mine, method) for method in columns.values())])
        return markdown(table) if len(table) > 1 else ""

    return _all(folder, of_model)


def delays(folder: Path) -> str:
    """Waves by their delay, PSNR in dB."""

    def of_model(rows: list[Row]) -> str:
        table = [["PSNR (10th percentile), dB", "N", "S", "published", "waves", "waves, delay 1"]]
        for run, mine in by_run(rows).items():
            for n, s in _SHAPES:
                names = ("asyncdiff", "wavefront", "wavefront, delay 1")
                cells = [_short(mine, f"{name} N={n} S={s} w=1") for name in names]
                if cells[-1]:
                    table.append([str(run), str(n), str(s), *cells])
        return markdown(table) if len(table) > 1 else ""

    return _all(folder, of_model)


def _all(folder: Path, tables: Callable[[list[Row]], str]) -> str:
    """A part for each model of which there is something to show."""
    parts = []
    for model, path, document in documents(folder):
        text = tables(document["figures"]["rows"])
        if text:
            parts.append(f"**{TITLES[model]}.** {_caption(path, document)}\n\n{text}")
    return "\n".join(parts) or _NOTHING


def _caption(path: Path, document: dict[str, Any]) -> str:
    e, settings = document["environment"], document["figures"]["settings"]
    on = e["gpus"][0] if e["gpus"] else "a CPU"
    return (
        f"{len(settings['prompts'])} pictures, drawn on {on}, torch {e['torch']}, commit "
        f"{e['commit']}. `benchmarks/fidelity/{e['command']}`, "
        f"[{path.name}](../benchmarks/results/{path.name})."
    )


def _compared(run: Run, rows: Sequence[Row]) -> bool:
    """Whether there is more than beside what qualities pick, which have a table of their own."""
    beside = ("quality ", "fewer ", "guidance ")
    names = [r["method"] for r in rows]
    more = any(not n.startswith(beside) and not n.endswith(" w=1") for n in names)
    return run.steps > _FEW and (more or not any(n.startswith("quality ") for n in names))


def _in_order(rows: Sequence[Row]) -> list[Row]:
    shown = []
    for start in _SHOWN:
        for row in (r for r in rows if r["method"].startswith(start)):
            _, with_end, end = row["method"].partition(" w=")
            if not with_end or f"w={end}" in _ENDS:
                shown.append(row)
    return shown


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """Speed-up, PSNR, its 10th percentile and SSIM."""
    speedup = f"{row['speedup']:.2f}"
    if row["psnr_db"] > _EXACT:
        return [speedup, "exact", "", ""]
    mark = "" if rival(row, rows) is None else " †"
    p10 = row.get("psnr_db_p10")  # of earlier results it is not known
    tenth = "" if p10 is None else f"{p10:.1f}"
    return [speedup, f"{row['psnr_db']:.1f}{mark}", tenth, f"{row['ssim']:.4f}"]


def _short(rows: Sequence[Row], method: str) -> str:
    for row in rows:
        if row["method"] == method:
            _, psnr, tenth, _ = _cells(row, rows)
            return f"{psnr} ({tenth})" if tenth else psnr
    return ""


def _at_speed(row: Row, rows: Sequence[Row]) -> str:
    speedup, psnr, tenth, _ = _cells(row, rows)
    return f"{psnr} ({tenth}) at {speedup}" if tenth else f"{psnr} at {speedup}"


def _picked(settings: Row, steps: int) -> str:
    """What a quality picked, in a few words."""
    n = settings["components"]
    if settings.get("schedule") != "wavefront":
        split = settings.get("guidance") == "split"
        return "every step exact, guidance split" if split else "one device"
    split = settings["guidance"] == "split"
    words = f"waves N={n}, {settings['warmup']} of {steps} steps exact"
    if split or settings["exact_mode"] == "split":
        words += ", guidance split" if split else ", those split"
    return words


def _measured(settings: Row) -> str:
    found = settings["measured_speedup"]
    return ", ".join(f"{found[m]:.2f}" if m in found else "–" for m in ("sdxl", "sd3", "flux"))
