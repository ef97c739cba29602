"""What the rows of the fidelity benchmark look like: a plot and a sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from asyncdiff.tools import compare

#: Pictures on a sheet.
_COLUMNS = 10


def kind(row: Mapping[str, Any]) -> str:
    """The method of a row without what is varied along its curve."""
    method = str(row["method"])
    return method.split(" w=")[0] if " w=" in method else method.split(",")[0]


def scatter(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Speed-up against PSNR, one colour a method, one marker a number of devices."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    kinds = list(dict.fromkeys(kind(r) for r in rows))
    markers = {1: "x", 2: "o", 3: "^", 4: "s"}
    for i, name in enumerate(kinds):
        mine = [r for r in rows if kind(r) == name]
        for devices in sorted({r["devices"] for r in mine}):
            points = sorted(
                (r["speedup"], min(r["psnr_db"], 80.0)) for r in mine if r["devices"] == devices
            )
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color=f"C{i}",
                marker=markers.get(devices, "d"),
                linestyle="-" if len(points) > 1 else "",
                label=f"{name}, {devices} device{'s' if devices > 1 else ''}",
            )
    axes.set(
        xlabel="speed-up of the critical path (MACs)",
        ylabel="PSNR to the plain pictures, dB (exact ones at 80)",
        title=f"{rows[0]['sampler']}, {rows[0]['steps']} steps, guidance {rows[0]['guidance']:g}",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def sheet(images: Mapping[str, torch.Tensor], prompts: Sequence[str], path: Path) -> None:
    """The first pictures of the fastest row of each curve, beneath the plain ones."""
    count = min(_COLUMNS, len(prompts))
    rows = {
        name: [x.clamp(0, 1).permute(1, 2, 0).numpy() for x in batch[:count]]
        for name, batch in images.items()
        if " w=" not in name or name.endswith(" w=1")
    }
    compare.sheet(rows, list(prompts[:count]), path, cell=64)
