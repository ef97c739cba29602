"""asyncdiff as a row of the fidelity benchmark."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import asyncdiff
from asyncdiff.partition.partition import Partition
from asyncdiff.sampling.clean_image import clean_image
from asyncdiff.sampling.predictor import default_order
from asyncdiff.schedule.plan import Plan, build, rank_count
from asyncdiff.schedule.simulate import Timing, predict
from fidelity.macs import balanced, total
from fidelity.method import Method, Work
from plan_macs import macs_by_rank


class Asynchronous(Method):
    """``parallelize`` with these settings, all ranks on one device: the same pictures as on many.

    The denoiser is split where it balances MACs. ``tail`` is ``exact_tail``; ``split``: each
    condition of the guidance has ranks of its own; ``compress``: what crosses, as the setting.
    """

    def __init__(
        self,
        name: str,
        device: str,
        components: int,
        stride: int,
        warmup: int,
        *,
        schedule: str = "asyncdiff",
        order: float | None = None,
        delay: int | None = None,
        tail: int = 0,
        split: bool = False,
        compress: str | None = None,
    ) -> None:
        self.name = f"{name} N={components} S={stride} w={warmup}"
        self.name += f" tail={tail}" if tail else ""
        self.components, self.stride, self.warmup = components, stride, warmup
        self.schedule, self.tail, self.delay = schedule, tail, delay
        self.guidance = "split" if split else "batched"
        self.compress = compress
        self.order: Any = order
        self.device = device
        self.devices = rank_count(components, stride, schedule) * (2 if split else 1)

    def run(self, pipe: Any, call: Mapping[str, Any], steps: int) -> torch.Tensor:
        """See :class:`Method`. ``pipe`` itself is left alone: a copy of it runs on the ranks."""
        return super().run(_spread(pipe, self).pipe, call, steps)

    def work(self, pipe: Any, call: Mapping[str, Any], steps: int) -> Work:
        """MACs of the busiest rank, and of the plan's critical path. Where guidance is split, each
        condition is half of the batch."""
        parts = balanced(pipe, self.components)
        work = plan_work(self.plan(parts, steps), parts)
        share = 2 if self.guidance == "split" else 1
        return Work(work.per_device / share, work.critical / share)

    def settings(self, pipe: Any, steps: int) -> dict[str, Any]:
        """Delay and order of waves, also where they are the default."""
        if self.schedule != "wavefront":
            return {}
        pipe.scheduler.set_timesteps(steps)
        delay = self.plan(balanced(pipe, self.components), steps).delay
        order = default_order(clean_image(pipe.scheduler), delay, self.stride)
        return {"delay": delay, "order": order if self.order is None else self.order}

    def plan(self, parts: Partition, steps: int) -> Plan:
        """The plan that such a generation follows."""
        return build(
            self.components,
            self.stride,
            self.warmup,
            steps,
            schedule=self.schedule,
            exact_tail=self.tail,
            delay=self.delay,
            exchanges=parts.exchanges,
        )


class Calibrated(Asynchronous):
    """Waves whose predictor is fitted on other prompts, ``texts``, than those that are drawn; half
    of them judge whether it is used."""

    def __init__(self, *args: Any, texts: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.texts = list(texts)

    def run(self, pipe: Any, call: Mapping[str, Any], steps: int) -> torch.Tensor:
        """See :class:`Method`. Noise of its own, too."""
        noise = [torch.Generator("cpu").manual_seed(10_000 + i) for i in range(len(self.texts))]
        arguments = {**call, "prompt": self.texts, "generator": noise}
        self.order = None
        self.order = _spread(pipe, self).calibrate(**arguments, num_inference_steps=steps)
        return super().run(pipe, call, steps)

    def settings(self, pipe: Any, steps: int) -> dict[str, Any]:
        """Their delay, on how many prompts they are calibrated, and how many of these judge."""
        delay = self.plan(balanced(pipe, self.components), steps).delay
        return {"delay": delay, "calibrated_on": len(self.texts), "judges": len(self.texts) // 2}


_current: list[Any] = []  # the pipeline that is spread, how, and its handle: one at a time


def _spread(pipe: Any, method: Asynchronous) -> Any:
    """A handle of a copy of ``pipe`` for this number of components, stride and schedule."""
    shape = (method.components, method.stride, method.schedule, method.delay)
    key = (*shape, method.guidance, method.compress, method.device)
    if not (_current and _current[0] is pipe and _current[1] == key):
        if _current:
            _current[2].restore()
        handle = asyncdiff.parallelize(
            copy.deepcopy(pipe),
            devices=[method.device] * method.devices,
            components=method.components,
            stride=method.stride,
            schedule=method.schedule,
            delay=method.delay,
            guidance=method.guidance,
            split=balanced(pipe, method.components).cuts or "estimate",
            compile=False,
            compress=method.compress,
        )
        _current[:] = [pipe, key, handle]
    # What a plan is made of may change between generations; what is prepared is kept.
    denoiser = _current[2].denoiser
    denoiser.configure(warmup=method.warmup, order=method.order, exact_tail=method.tail)
    return _current[2]


def plan_work(plan: Plan, parts: Partition) -> Work:
    """What a plan computes: its latency with MACs for milliseconds, and links that take no time."""
    report = parts.report()
    timeline = predict(plan, Timing(tuple(float(c.macs) for c in report.components)))
    return Work(max(macs_by_rank(plan, report)), timeline.total_ms)


def plain_work(pipe: Any, steps: int) -> Work:
    """What the pipeline computes by itself on one device."""
    macs = float(total(pipe)) * steps
    return Work(macs, macs)
