"""What a plan predicts for a parallelised pipeline, where its ranks share a device."""

from __future__ import annotations

from typing import Any

import torch

from ..partition.cost import link_speed
from ..schedule.simulate import Timing, predict

#: Microseconds that a message takes from one device to another; it hardly matters.
LATENCY_US = 5.0


def predicted_speedup(handle: Any, steps: int) -> float | None:
    """How many times one device's speed a generation of ``steps`` has on as many devices, each like
    that on which the nodes were timed, from their times and the links' speed.

    Exact steps that are split, a condition on each of two devices, are taken to need half as long.
    ``handle``: of :func:`asyncdiff.parallelize`, after a generation. None where the conditions are
    always split, or every step is exact: what each condition takes was not timed.
    """
    devices = [torch.device(d) for d in handle.denoiser.devices]
    plan = handle.plan(steps)
    split = sum(handle.config.spec(range(steps), shorten=True).split_steps)
    if len(devices) != plan.ranks or plan.steps + split != steps:
        return None
    report = handle.partition.report().to_dict()
    if not report["source"].startswith("measured"):
        return None
    timing = Timing.from_report(
        report, link_gb_per_s=link_speed(devices) / 1e6, link_latency_us=LATENCY_US
    )
    timeline = predict(plan, timing)
    a_step = timeline.sequential_ms / plan.steps
    return a_step * steps / (timeline.total_ms + split * a_step / 2)
