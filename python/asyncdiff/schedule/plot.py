"""A predicted timeline as a picture."""

from __future__ import annotations

from collections import defaultdict
from os import PathLike
from typing import Any

from ..errors import AsyncDiffError
from .plan import Plan
from .simulate import Span, SpanKind, Timeline, summary


def blank(what: str, width: float, height: float) -> Any:
    """An empty figure, in inches, for ``what``. Without pyplot: no global backend is chosen, no
    window is ever opened. Raises AsyncDiffError where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise AsyncDiffError(f"{what} needs matplotlib: pip install 'asyncdiff[demo]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw(timeline: Timeline, path: str | PathLike[str], first_ticks: int = 6) -> None:
    """Write a PNG: above, the warm-up's last step and ``first_ticks`` ticks; below, all of it.

    A rank's row shows its component (colour), what leaves it (thin bar) and updates (black).
    Raises AsyncDiffError where matplotlib is missing (it is in the extra ``demo``), OSError where
    the file cannot be written.
    """
    plan = timeline.plan
    begin = plan.ticks[max(0, plan.warmup - 1)].index
    last = plan.ticks[min(len(plan.ticks), plan.warmup + first_ticks) - 1].index
    window = timeline.tick_bounds(begin)[0], timeline.tick_bounds(last)[1]
    whole = 0.0, max(s.end_ms for s in timeline.spans)
    figure = blank("a timeline", 13, 2.9 + 0.9 * plan.ranks)
    near, far = figure.subplots(2, 1)
    _draw_rows(near, timeline, window, labels=True)
    _draw_rows(far, timeline, whole, labels=False)
    shown = [k for t in plan.ticks[begin : last + 1] for k in t.serves]
    near.set_title(f"steps {shown[0]} to {shown[-1]}", loc="left")
    far.set_title("the whole generation", loc="left")
    far.set_xlabel("milliseconds")
    figure.suptitle(summary(timeline), fontsize=10, ha="left", x=0.01)
    _legend(figure, plan)
    figure.savefig(path, dpi=110, format="png")


def _draw_rows(axes: Any, timeline: Timeline, window: tuple[float, float], labels: bool) -> None:
    plan = timeline.plan
    low, high = window
    shown = [s for s in timeline.spans if s.end_ms > low and s.start_ms < high]
    # One collection of bars for each rank and kind: drawing bar by bar takes seconds.
    groups: dict[tuple[int, SpanKind, int], list[Span]] = defaultdict(list)
    for s in shown:
        groups[s.rank, s.kind, s.component].append(s)
    for (rank, kind, component), group in groups.items():
        top, height, colour = {
            SpanKind.RUN: (-0.36, 0.5, _colour(component)),
            SpanKind.EXCHANGE: (0.16, 0.16, _colour(component)),
            SpanKind.UPDATE: (-0.36, 0.5, "black"),
        }[kind]
        axes.broken_barh(
            [(s.start_ms, s.ms) for s in group], (rank + top, height), facecolor=colour,
            edgecolor=colour if kind is SpanKind.EXCHANGE else "white", linewidth=0.4,
            hatch="//" if kind is SpanKind.RUN and rank >= plan.components else None,
            alpha=0.55 if kind is SpanKind.EXCHANGE else 1.0,
        )  # fmt: skip
    if labels:
        for s in shown:
            if s.kind is SpanKind.RUN and s.ms > 0.02 * (high - low):
                axes.text(
                    (s.start_ms + s.end_ms) / 2, s.rank - 0.11, f"t{s.time}",
                    ha="center", va="center", fontsize=7, color="white", clip_on=True,
                )  # fmt: skip
    axes.set_xlim(low, high)
    axes.set_ylim(plan.ranks - 0.4, -0.6)
    axes.set_yticks(range(plan.ranks), [f"rank {r}" for r in range(plan.ranks)])
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, plan: Plan) -> None:
    from matplotlib.patches import Patch

    parts = [Patch(facecolor=_colour(c), label=f"component {c}") for c in range(plan.components)]
    if plan.stride > 1:
        copy = Patch(facecolor="grey", edgecolor="white", hatch="//", label="copy of the last")
        parts.append(copy)
    if plan.components > 1:
        parts.append(Patch(facecolor="grey", alpha=0.55, label="thin: boundary on its way"))
    parts.append(Patch(facecolor="black", label="sampler update"))
    columns = min(7, len(parts))
    figure.legend(
        handles=parts, loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )


_PALETTE = (
    "#3b6ea5", "#c8553d", "#588b5a", "#8f6fa8", "#b8862d", "#3e8e8c", "#a8476f", "#6b6b6b"
)  # fmt: skip


def _colour(component: int) -> str:
    return _PALETTE[component % len(_PALETTE)]
