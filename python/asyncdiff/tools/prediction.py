"""What a plan predicts for a parallelised pipeline, where its ranks share a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..generation.spec import GenerationSpec
from ..processes.team import Team
from ..runtime.cutting.link_speed import engine_links
from ..runtime.devices import Place
from ..schedule.simulate import Timing, predict

#: Microseconds that a message takes where it was not measured; it hardly matters.
LATENCY_US = 5.0


def links_between(devices: Sequence[torch.device]) -> dict[str, float]:
    """The slowest link between neighbours of these devices, measured: arguments of a
    :class:`~asyncdiff.schedule.simulate.Timing`."""
    links = engine_links([Place.here(d) for d in devices], Team())
    return {
        "link_gb_per_s": links.bytes_per_ms / 1e6,
        "link_latency_us": links.latency_ms * 1e3 or LATENCY_US,
    }


def predicted_speedup(handle: Any, steps: int) -> float | None:
    """How many times one device's speed a generation of ``steps`` has on as many devices, each like
    that on which the nodes were timed, from their times and the links' speed.

    Exact steps that are split, a condition on each of two devices, are taken to need half as long.
    ``handle``: of :func:`asyncdiff.parallelize`, after a generation. None where the conditions are
    always split, or every step is exact: what each condition takes was not timed.
    """
    devices = [torch.device(d) for d in handle.denoiser.devices]
    plan = handle.plan(steps)
    split = sum(GenerationSpec.of(handle.config, range(steps), shorten=True).split_steps)
    if len(devices) != plan.ranks or plan.steps + split != steps:
        return None
    report = handle.partition.report().to_dict()
    if not report["source"].startswith("measured"):
        return None
    timing = Timing.from_report(report, **links_between(devices))
    timeline = predict(plan, timing)
    a_step = timeline.sequential_ms / plan.steps
    return a_step * steps / (timeline.total_ms + split * a_step / 2)
