"""The PNG: latency and bandwidth by size, one line a way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import nan
from pathlib import Path
from typing import Any

from .errors import BenchError
from .figures import Figure, Results
from .payload import size_text
from .table import title_of

_STYLES = {"graph": "-", "eager": "--", "threads": "-"}


_PANELS: tuple[tuple[str, str, Callable[[Figure], float]], ...] = (
    ("latency", "one way, µs", lambda f: f.value.median),
    ("bandwidth", "back to back, GB/s", lambda f: f.gb_per_s or nan),
    ("bidirectional", "both directions, GB/s", lambda f: f.gb_per_s or nan),
)


def check(cases: Iterable[str]) -> None:
    """Raise BenchError where none of these cases is drawn."""
    names = [case for case, _, _ in _PANELS]
    if not set(names) & set(cases):
        raise BenchError(f"nothing to draw: none of {', '.join(names)} is measured")


def picture(results: Results) -> Any:
    """The plot as a matplotlib figure. Raises BenchError where no figure is one by size."""
    present = {f.case for f in results.figures}
    check(present)
    panels = [p for p in _PANELS if p[0] in present]
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture

    drawn = Picture(figsize=(6.4 * len(panels), 5.2), layout="constrained")
    FigureCanvasAgg(drawn)
    ways = list(dict.fromkeys(f.way for f in results.figures))
    colours = {way: f"C{i}" for i, way in enumerate(ways)}
    for i, (case, label, value) in enumerate(panels):
        axes = drawn.add_subplot(1, len(panels), i + 1)
        figures = [f for f in results.figures if f.case == case]
        _panel(axes, figures, colours, label, value)
    drawn.suptitle(" → ".join(results.devices[:2]))
    return drawn


def draw(results: Results, path: Path) -> None:
    """Write the plot as PNG. Raises BenchError where no figure is one by size."""
    picture(results).savefig(path, dpi=150, format="png")


def _panel(
    axes: Any, figures: list[Figure], colours: dict[str, str], label: str, value: Any
) -> None:
    from matplotlib.ticker import LogLocator

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
    # Powers of ten alone would leave a panel whose values lie between two of them without a label.
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.set_xlabel("size of a bundle")
    axes.set_ylabel(label)
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=7)
