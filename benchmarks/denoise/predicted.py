"""What plans would take on more GPUs than there are, from components timed alone on one.

Not measured: the plan's simulation (asyncdiff.schedule.simulate) of component times measured on
this GPU, and of links as they are between two H200s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from asyncdiff.partition.report import PartitionReport
from asyncdiff.schedule.plan import Exchange, build
from asyncdiff.schedule.simulate import Timing, predict
from plan_macs import macs_by_rank

#: One way over NVLink: copy engines on 64 MiB, and a flag alone.
LINK_GB_PER_S, LINK_LATENCY_US = 389.0, 1.34
#: (components, stride) of the rows, each with these numbers of exact steps.
SHAPES, WARMUPS = ((2, 1), (3, 1), (4, 1), (2, 2), (3, 2)), (1, 9)


@dataclass(frozen=True)
class Alone:
    """A partition and the milliseconds of each of its components, alone in a CUDA graph."""

    parts: PartitionReport
    component_ms: tuple[float, ...]


def predicted(
    alone: Mapping[int, Alone], steps: int, update_ms: float, one_gpu_ms: float
) -> dict[str, Any]:
    """A row for each plan whose number of components is a key of ``alone``.

    ``update_ms``: what the loop takes for a step besides the denoiser; ``one_gpu_ms``: a step of
    the same loop on one GPU, measured.
    """
    rows = {}
    for n, s in SHAPES:
        if n not in alone:
            continue
        parts, times = alone[n].parts, alone[n].component_ms
        links = {
            "link_gb_per_s": LINK_GB_PER_S,
            "link_latency_us": LINK_LATENCY_US,
            "update_ms": update_ms,
        }
        report = parts.to_dict()
        for component, ms in zip(report["components"], times, strict=True):
            component["ms"] = ms
        edges = [Exchange(b.source, b.target) for b in parts.boundaries]
        for w in WARMUPS:
            if w > steps:
                continue
            plan = build(n, s, w, steps, exchanges=edges)
            line = predict(plan, Timing.from_report(report, **links))
            ms = line.total_ms / steps
            rows[f"N={n} S={s} w={w}"] = {
                "gpus": plan.ranks,
                "ms_a_step": round(ms, 3),
                "speedup_over_one_gpu": round(one_gpu_ms / ms, 3),
                "component_ms_alone": [round(t, 3) for t in times],
                "exposed_share": round(line.exposed_ms / line.total_ms, 5),
                "exchange_mib_per_step": round(line.exchange_bytes / steps / 2**20, 2),
                "gmacs_per_step_by_rank": [
                    round(m / 1e9 / steps, 2) for m in macs_by_rank(plan, parts)
                ],
            }
    return rows
