"""The PNG: latency and bandwidth by size, one line a way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import BenchError
from .figures import Figure, Results
from .payload import size_text
from .table import title_of

_STYLES = {"graph": "-", "eager": "--", "threads": "-"}


def draw(results: Results, path: Path) -> None:
    """Write the plot. Raises BenchError where no figure is one by size."""
    panels = [
        ("latency", "one way, µs", lambda f: f.value.median),
        ("bandwidth", "back to back, GB/s", lambda f: f.gb_per_s),
        ("bidirectional", "both directions, GB/s", lambda f: f.gb_per_s),
    ]
    present = {f.case for f in results.figures}
    panels = [p for p in panels if p[0] in present]
    if not panels:
        raise BenchError("nothing to draw: no case by size was measured")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(6.4 * len(panels), 5.2), layout="constrained")
    FigureCanvasAgg(picture)
    ways = list(dict.fromkeys(f.way for f in results.figures))
    colours = {way: f"C{i}" for i, way in enumerate(ways)}
    for i, (case, label, value) in enumerate(panels):
        axes = picture.add_subplot(1, len(panels), i + 1)
        figures = [f for f in results.figures if f.case == case]
        _panel(axes, figures, colours, label, value)
    picture.suptitle(" → ".join(results.devices[:2]))
    picture.savefig(path, dpi=150)


def _panel(
    axes: Any, figures: list[Figure], colours: dict[str, str], label: str, value: Any
) -> None:
    for way, launch in dict.fromkeys((f.way, f.launch) for f in figures):
        line = sorted(
            (f for f in figures if (f.way, f.launch) == (way, launch)), key=lambda f: f.nbytes
        )
        axes.plot(
            [f.nbytes for f in line],
            [value(f) for f in line],
            _STYLES.get(launch, ":"),
            marker=".",
            color=colours[way],
            label=f"{title_of(way)} ({launch})",
        )
    sizes = sorted({f.nbytes for f in figures})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [size_text(n) for n in sizes])
    axes.minorticks_off()
    axes.set_xlabel("size of a bundle")
    axes.set_ylabel(label)
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=7)
