"""Tables of what pictures keep, from the results of ``run.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fidelity.rivals import rival
from markdown_table import markdown

Row = dict[str, Any]

#: Rows of the fidelity benchmark that are shown: those that begin so, in this order.
_SHOWN = (
    "asyncdiff N=",
    "wavefront N=",
    "wavefront, calibrated N=",
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

#: N and S of the smaller tables.
_SHAPES = ((2, 1), (3, 1), (4, 1), (2, 2), (3, 2))
_SAMPLERS = {"ddim": "DDIM", "dpm": "DPM-Solver++", "euler": "Euler"}


def kept(path: Path) -> str:
    """PSNR and speed-up, a table for each sampler, of exact ends where a row has some."""
    document = _read(path)
    rows = document["figures"]["rows"]
    parts = [
        _caption(path, document)
        + " †: a compared method on no more devices is at least as fast and closer.\n"
    ]
    for sampler, steps in _runs(rows):
        mine = [r for r in rows if (r["sampler"], r["steps"]) == (sampler, steps)]
        parts.append(f"{_SAMPLERS[sampler]}, {steps} steps:\n\n" + _by_end(mine))
    return "\n".join(parts)


def few_steps(path: Path) -> str:
    """Published schedule and waves, PSNR in dB, by number of steps."""
    document = _read(path)
    rows = document["figures"]["rows"]
    shapes = ((2, 1), (4, 1), (2, 2))
    heads = [f"N={n} S={s}: published, waves" for n, s in shapes]
    table = [["", *heads]]
    for sampler, steps in sorted(_runs(rows), key=lambda run: -run[1]):
        mine = _psnr(rows, sampler, steps)
        cells = [
            ", ".join(mine[f"{kind} N={n} S={s} w=1"] for kind in ("asyncdiff", "wavefront"))
            for n, s in shapes
        ]
        table.append([f"{_SAMPLERS[sampler]}, {steps} steps", *cells])
    return _caption(path, document) + "\n\n" + markdown(table)


def delays(path: Path) -> str:
    """Waves by their delay, and calibrated, PSNR in dB, without and with an exact last step."""
    document = _read(path)
    rows = document["figures"]["rows"]
    titles = ["published", "delay 1", "delay N − 1", "calibrated"]
    tails = [f"one exact step at the end: {titles[0]}", *titles[1:]]
    table = [["", "N", "S", *titles, *tails]]
    for sampler, steps in _runs(rows):
        mine = _psnr(rows, sampler, steps)
        for n, s in _SHAPES:
            cells = []
            for end in (" w=1", " w=1 tail=1"):
                at = f"N={n} S={s}{end}"
                whole = "the same" if n == 2 else mine[f"wavefront, whole {at}"]
                learnt = mine[f"wavefront, calibrated {at}"]
                cells += [mine[f"asyncdiff {at}"], mine[f"wavefront {at}"], whole, learnt]
            table.append([f"{_SAMPLERS[sampler]}, {steps} steps", str(n), str(s), *cells])
    return _caption(path, document) + "\n\n" + markdown(table)


def orders(path: Path, tried: Path) -> str:
    """Waves of the longest delay by their order, PSNR in dB."""
    documents = [_read(path), _read(tried)]
    rows = [row for document in documents for row in document["figures"]["rows"]]
    table = [["", "N", "S", "published", "order 0", "0.5", "1", "default"]]
    for sampler, steps in _runs(rows):
        mine = _psnr(rows, sampler, steps)
        for n, s in _SHAPES:
            at, whole = f"N={n} S={s} w=1", "wavefront" if n == 2 else "wavefront, whole"
            cells = [mine[f"{whole}, order {order} {at}"] for order in ("0", "0.5", "1")]
            cells = [mine[f"asyncdiff {at}"], *cells, mine[f"{whole} {at}"]]
            table.append([f"{_SAMPLERS[sampler]}, {steps} steps", str(n), str(s), *cells])
    return _caption(tried, documents[1]) + "\n\n" + markdown(table)


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def _caption(path: Path, document: dict[str, Any]) -> str:
    e, settings = document["environment"], document["figures"]["settings"]
    on = e["gpus"][0] if e["gpus"] else "a CPU"
    return (
        f"{len(settings['prompts'])} prompts, guidance {settings['guidance']:g}, drawn on {on}, "
        f"torch {e['torch']}, commit {e['commit']}. `benchmarks/fidelity/{e['command']}`, "
        f"[{path.name}](../benchmarks/results/{path.name})."
    )


def _runs(rows: list[Row]) -> list[tuple[str, int]]:
    return list(dict.fromkeys((r["sampler"], r["steps"]) for r in rows))


def _psnr(rows: list[Row], sampler: str, steps: int) -> dict[str, str]:
    """PSNR by method."""
    mine = (r for r in rows if (r["sampler"], r["steps"]) == (sampler, steps))
    return {r["method"]: f"{r['psnr_db']:.1f}" for r in mine}


def _by_end(rows: list[dict[str, Any]]) -> str:
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
