"""Results for people: one table a case, and what was left out, with reasons."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .figures import Figure, LeftOut, Results
from .ways import known

T = TypeVar("T", bound=Hashable)


def render(results: Results) -> Group:
    """All cases in the order of their figures, then what was left out."""
    parts: list[Table | Text] = []
    for case in _unique(f.case for f in results.figures):
        figures = [f for f in results.figures if f.case == case]
        if case == "exposed":
            parts.append(_exposed(figures))
            continue
        parts.append(_by_payload(f"{case}, {_unit(figures)}", figures, _micros))
        if any(f.gb_per_s for f in figures):
            parts.append(_by_payload(f"{case}, GB/s", figures, _rate))
    if results.left_out:
        everywhere = {f.case for f in results.figures} | {x.case for x in results.left_out}
        parts.append(_left_out(results.left_out, everywhere))
    return Group(*parts)


def _unit(figures: list[Figure]) -> str:
    metrics = {
        "one_way": "µs one way", "per_bundle": "µs a bundle", "put_cpu": "µs of CPU time a put"
    }  # fmt: skip
    return metrics.get(figures[0].metric, figures[0].unit)


def _by_payload(title: str, figures: list[Figure], cell: Callable[[Figure], str]) -> Table:
    payloads = _unique(f.payload for f in figures)
    table = Table(title=title, title_justify="left")
    table.add_column("way", no_wrap=True)
    for name in payloads:
        table.add_column(name, justify="right", no_wrap=True)
    found = {(f.way, f.launch, f.payload): f for f in figures}
    for way, launch in _unique((f.way, f.launch) for f in figures):
        row = [found.get((way, launch, p)) for p in payloads]
        table.add_row(f"{title_of(way)} ({launch})", *("" if f is None else cell(f) for f in row))
    return table


def _exposed(figures: list[Figure]) -> Table:
    table = Table(title="exposed, % slower than alone (quartiles)", title_justify="left")
    for i, name in enumerate(("way", "bundle", "load", "what", "slower")):
        table.add_column(name, justify="right" if i == 4 else "left", no_wrap=True)
    for f in figures:
        what = f"matmuls of the {f.details['side']}" if "side" in f.details else "exchange"
        slower = f"{f.value.median:.2f} ({f.value.q1:.2f} to {f.value.q3:.2f})"
        table.add_row(title_of(f.way), f.payload, str(f.details.get("load", "")), what, slower)
    return table


def _left_out(items: list[LeftOut], cases: set[str]) -> Table:
    """Grouped: a way that cannot run here says so once, not for each case."""
    table = Table(title="left out", title_justify="left")
    for name in ("way", "case", "why"):
        table.add_column(name, overflow="fold")
    for way, reason, failed in _unique((x.way, x.reason, x.failed) for x in items):
        where = _unique(
            " ".join(filter(None, (x.case, x.payload)))
            for x in items
            if (x.way, x.reason, x.failed) == (way, reason, failed)
        )
        whole = set(where) >= cases
        style = "red" if failed else None
        prefix = "FAILED: " if failed else ""
        table.add_row(
            title_of(way), "all" if whole else ", ".join(where), Text(prefix + reason), style=style
        )
    return table


def title_of(way: str) -> str:
    """A way for readers; one that is not known any more by its key."""
    ways = known()
    return ways[way].title if way in ways else way


def _micros(figure: Figure) -> str:
    mode = figure.details.get("mode")  # what auto has become
    return digits(figure.value.median) + (f" {mode}" if mode and figure.way == "auto" else "")


def _rate(figure: Figure) -> str:
    return "" if figure.gb_per_s is None else digits(figure.gb_per_s)


def digits(x: float) -> str:
    """Three significant digits, and no fewer than those before the point."""
    if abs(x) >= 100:
        return f"{x:.0f}"
    return f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"


def _unique(items: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(items))
