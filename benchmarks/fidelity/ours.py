"""asyncdiff as a row of the fidelity benchmark."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from fidelity.macs import balanced, total
from fidelity.method import Method, Work

import asyncdiff
from asyncdiff.partition import Partition
from asyncdiff.plan import Plan
from asyncdiff.timeline import Timing, predict


class Asynchronous(Method):
    """``parallelize`` with these settings, all ranks on one device: the same pictures as on many.

    The denoiser is split where it balances MACs.
    """

    def __init__(
        self, name: str, device: str, components: int, stride: int, warmup: int, **settings: Any
    ) -> None:
        self.name = name
        self.components, self.stride, self.warmup = components, stride, warmup
        self._device = device
        self._settings = settings
        self.devices = self.ranks = components + stride - 1

    @contextlib.contextmanager
    def applied(self, pipe: Any, steps: int) -> Iterator[int]:
        """See :class:`Method`."""
        handle = asyncdiff.parallelize(
            pipe,
            devices=[self._device] * self.ranks,
            components=self.components,
            stride=self.stride,
            warmup=self.warmup,
            split="estimate" if self.components == 1 else balanced(pipe, self.components).cuts,
            compile=False,
            **self._settings,
        )
        try:
            yield steps
        finally:
            handle.restore()

    def work(self, pipe: Any, call: Mapping[str, Any], steps: int) -> Work:
        """MACs of the busiest rank, and of the plan's critical path."""
        parts = balanced(pipe, self.components)
        return plan_work(self.plan(parts, steps), parts)

    def plan(self, parts: Partition, steps: int) -> Plan:
        """The plan that such a generation follows."""
        return asyncdiff.plan.build(
            self.components, self.stride, self.warmup, steps, exchanges=parts.exchanges
        )


def plan_work(plan: Plan, parts: Partition) -> Work:
    """What a plan computes: its latency with MACs for milliseconds, and links that take no time."""
    macs = [float(c.macs) for c in parts.report().components]
    by_rank = dict.fromkeys(range(plan.ranks), 0.0)
    for tick in plan.ticks:
        for run in tick.runs:
            by_rank[run.rank] += macs[run.component]
    timeline = predict(plan, Timing(tuple(macs)))
    return Work(max(by_rank.values()), timeline.total_ms)


def plain_work(pipe: Any, steps: int) -> Work:
    """What the pipeline computes by itself on one device."""
    macs = float(total(pipe)) * steps
    return Work(macs, macs)
