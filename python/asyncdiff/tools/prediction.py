"""What a plan predicts for a parallelised pipeline, where its ranks share a device."""

from __future__ import annotations

from typing import Any

import torch

from ..partition.cost import link_speed
from ..schedule.simulate import Timeline, Timing, predict

#: Microseconds that a message takes from one device to another; it hardly matters.
LATENCY_US = 5.0


def predicted(handle: Any, steps: int) -> Timeline | None:
    """The timeline of a generation of ``steps`` on as many devices, each like that on which the
    nodes were timed, from their times and the links' speed.

    ``handle``: of :func:`asyncdiff.parallelize`, after a generation. None where conditions are
    split over groups of ranks, whose sequential time is not that of the parts, and where nodes were
    not timed.
    """
    devices = [torch.device(d) for d in handle.denoiser.devices]
    plan = handle.plan(steps)
    if len(devices) != plan.ranks or plan.steps != steps:
        return None
    report = handle.partition.report().to_dict()
    if not report["source"].startswith("measured"):
        return None
    timing = Timing.from_report(
        report, link_gb_per_s=link_speed(devices) / 1e6, link_latency_us=LATENCY_US
    )
    return predict(plan, timing)
