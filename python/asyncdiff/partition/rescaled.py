"""Costs of a denoiser's nodes for other sizes than those that they were measured at."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ..graph.capture import Captured
from .cost import Costs, estimate

#: Of so many graphs what was measured is kept.
_KEPT = 8
#: Milliseconds below which a node is not expected to get, however small it becomes.
_LEAST = 0.002


@dataclass
class _Known:
    """What was measured on a kind of device; nodes in order, of which it holds nothing."""

    kind: str
    operations: list[tuple[str, str]]
    measured: list[float]
    estimated: list[float]
    source: str
    timed: bool


class Measured:
    """Costs as they were measured, by kind of device."""

    def __init__(self) -> None:
        self._known: deque[_Known] = deque(maxlen=_KEPT)

    def keep(self, kind: str, captured: Captured, costs: Costs) -> None:
        """Keep what was measured on a device of this kind."""
        before = estimate(captured)
        measured, estimated = ([c.ms[n] for n in captured.nodes] for c in (costs, before))
        told = costs.source, costs.timed
        self._known.append(_Known(kind, _operations(captured), measured, estimated, *told))

    def at_other_sizes(self, kind: str, captured: Captured) -> Costs | None:
        """What the nodes of ``captured`` cost on a device of this kind, by what was measured of a
        graph with the same operations: each as many times more as FLOPs and bytes become more. None
        where there is no such graph. Better than an estimate, and worse than what is measured."""
        own = _operations(captured)
        known = next(
            (k for k in reversed(self._known) if k.kind == kind and k.operations == own), None
        )
        if known is None:
            return None
        now, ms = estimate(captured), {}
        for node, measured, then in zip(
            captured.nodes, known.measured, known.estimated, strict=True
        ):
            ratio = now.ms[node] / then if then > 0 else 1.0
            ms[node] = max(measured * ratio, min(measured, _LEAST))
        source = f"{known.source}, at other sizes"
        return Costs(ms, now.macs, source, timed=known.timed)


def _operations(captured: Captured) -> list[tuple[str, str]]:
    return [(node.name, str(node.target)) for node in captured.nodes]
