"""Multiply-accumulates (MACs) that the ranks of a plan compute."""

from __future__ import annotations

from asyncdiff.partition.report import PartitionReport
from asyncdiff.schedule.plan import Plan


def macs_by_rank(plan: Plan, parts: PartitionReport) -> list[float]:
    """MACs of each rank in a generation."""
    macs = dict.fromkeys(range(plan.ranks), 0.0)
    for tick in plan.ticks:
        for run in tick.runs:
            macs[run.rank] += parts.components[run.component].macs
    return list(macs.values())
