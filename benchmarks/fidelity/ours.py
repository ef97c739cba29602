"""asyncdiff as a row of the fidelity benchmark."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

import asyncdiff
from asyncdiff.partition import Partition
from asyncdiff.plan import Plan, build, rank_count
from asyncdiff.timeline import Timing, predict
from fidelity.macs import balanced, total
from fidelity.method import Method, Work


class Asynchronous(Method):
    """``parallelize`` with these settings, all ranks on one device: the same pictures as on many.

    The denoiser is split where it balances MACs.
    """

    def __init__(
        self, name: str, device: str, components: int, stride: int, warmup: int, **settings: Any
    ) -> None:
        self.name = name
        self.components, self.stride, self.warmup = components, stride, warmup
        self.device = device
        self.schedule = settings.pop("schedule", "asyncdiff")
        self._settings = settings
        self.devices = rank_count(components, stride, self.schedule)

    def run(self, pipe: Any, call: Mapping[str, Any], steps: int) -> torch.Tensor:
        """See :class:`Method`. ``pipe`` itself is left alone: a copy of it runs on the ranks."""
        spread = _spread(pipe, self)
        # What a plan is made of may change between generations; what is prepared is kept.
        spread.denoiser.warmup = self.warmup
        for name, value in self._settings.items():
            setattr(spread.denoiser, name, value)
        return super().run(spread.pipe, call, steps)

    def work(self, pipe: Any, call: Mapping[str, Any], steps: int) -> Work:
        """MACs of the busiest rank, and of the plan's critical path."""
        parts = balanced(pipe, self.components)
        return plan_work(self.plan(parts, steps), parts)

    def plan(self, parts: Partition, steps: int) -> Plan:
        """The plan that such a generation follows."""
        return build(
            self.components,
            self.stride,
            self.warmup,
            steps,
            schedule=self.schedule,
            exchanges=parts.exchanges,
        )


_current: list[Any] = []  # the pipeline that is spread, how, and its handle: one at a time


def _spread(pipe: Any, method: Asynchronous) -> Any:
    """A handle of a copy of ``pipe`` for this number of components, stride and schedule."""
    key = (method.components, method.stride, method.schedule, method.device)
    if _current and _current[0] is pipe and _current[1] == key:
        return _current[2]
    if _current:
        _current[2].restore()
    parts = balanced(pipe, method.components)
    handle = asyncdiff.parallelize(
        copy.deepcopy(pipe),
        devices=[method.device] * method.devices,
        components=method.components,
        stride=method.stride,
        schedule=method.schedule,
        split=parts.cuts or "estimate",
        compile=False,
    )
    _current[:] = [pipe, key, handle]
    return handle


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
