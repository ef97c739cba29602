"""What :func:`asyncdiff.tools.tune.tune` tried, as a picture: speed against fidelity."""

from __future__ import annotations

import itertools
from os import PathLike

from ..schedule.plot import blank
from .tune import Trial, Tuned

_NAMES = {"asyncdiff": "as published", "wavefront": "waves"}
_COLOURS = ("C3", "C0", "C1", "C2", "C4", "C5", "C6", "C8")


def draw(
    found: Tuned,
    path: str | PathLike[str],
    *,
    psnr_db: float | None = None,
    max_lpips: float | None = None,
) -> None:
    """Write a PNG: a point for every setting, a colour for each N, S and schedule, the wanted
    fidelity as a line and a ring around what was taken.

    Raises AsyncDiffError where matplotlib is missing (it is in the extra ``demo``).
    """

    def height(trial: Trial) -> float:
        if max_lpips is not None:
            return trial.fidelity.learned["lpips"]
        return trial.fidelity.psnr_db

    axes = blank("a plot", 7.5, 5).subplots()
    families = dict.fromkeys(_family(t) for t in found.tried)
    for name, colour in zip(families, itertools.cycle(_COLOURS), strict=False):
        mine = sorted((t for t in found.tried if _family(t) == name), key=lambda t: t.speedup)
        at = [(t.speedup, height(t)) for t in mine]
        axes.plot(*zip(*at, strict=True), marker="o", color=colour, label=name)
        for trial, point in zip(mine, at, strict=True):
            end = f"w={trial.arguments['warmup']}, end {trial.arguments['exact_tail']}"
            axes.annotate(end, point, xytext=(5, 5), textcoords="offset points", fontsize=7)
    wanted = psnr_db if max_lpips is None else max_lpips
    if wanted is not None:
        axes.axhline(wanted, color="grey", linestyle="--", linewidth=1, label="wanted")
    chosen = found.chosen
    axes.plot(
        [chosen.speedup], [height(chosen)], "o", markersize=16, markerfacecolor="none",
        color="black", label="taken",
    )  # fmt: skip
    axes.margins(0.12)
    axes.set_xlabel("predicted speed of the denoiser, times that of one device")
    axes.set_ylabel("mean PSNR to the plain pictures, dB" if max_lpips is None else "mean LPIPS")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.figure.savefig(path, dpi=130, format="png")


def _family(trial: Trial) -> str:
    arguments = trial.arguments
    return f"{_NAMES[arguments['schedule']]}, N={arguments['components']} S={arguments['stride']}"
