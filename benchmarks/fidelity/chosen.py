"""What ``parallelize(pipe, quality=…)`` picks, as a row of the fidelity benchmark."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch

from asyncdiff.quality import Picked, Task, pick
from asyncdiff.sampling.clean_image import clean_image
from fidelity.macs import balanced
from fidelity.measured import speedup, split_steps
from fidelity.method import Method, Work
from fidelity.ours import Asynchronous, plain_work


class Chosen(Method):
    """A quality on so many devices, each of which has room for the denoiser, for one picture.

    The batch that the benchmark draws at once is many such pictures: it is not taken apart.
    ``compress``: what crosses, as the setting.
    """

    def __init__(
        self,
        quality: str,
        devices: int,
        device: str,
        guided: bool,
        compress: str | None = None,
    ) -> None:
        self.name = f"quality {quality}, {devices} devices"
        self.quality, self.count, self.device, self.guided = quality, devices, device, guided
        self.devices, self.compress = devices, compress

    def run(self, pipe: Any, call: Mapping[str, Any], steps: int) -> torch.Tensor:
        """See :class:`Method`."""
        method = self._method(self._picked(pipe, steps))
        # Exact ways give the plain pipeline's pictures (tests/host/test_fidelity_bench.py).
        return super().run(pipe, call, steps) if method is None else method.run(pipe, call, steps)

    def work(self, pipe: Any, call: Mapping[str, Any], steps: int) -> Work:
        """Exact steps that are split, a condition on each of two devices, take half as long."""
        picked, plain = self._picked(pipe, steps), plain_work(pipe, steps)
        method = self._method(picked)
        if method is None:
            share = 2 if picked.settings.get("guidance") == "split" else 1
            return Work(plain.per_device / share, plain.critical / share)
        work = method.work(pipe, call, steps)
        if picked.settings["exact_mode"] == "chain":
            return work
        # A chain has each device compute its component in those steps, all of them one by one.
        whole = plain.critical / steps
        largest = max(c.macs for c in balanced(pipe, method.components).report().components)
        more, less = whole / 2 - largest, whole / 2
        split = split_steps(picked.settings)
        return Work(work.per_device + split * more, work.critical - split * less)

    def settings(self, pipe: Any, steps: int) -> dict[str, Any]:
        """What was picked, and how much faster real models are with it."""
        picked = self._picked(pipe, steps)
        values = {**picked.settings, "measured_speedup": speedup(picked.settings, steps)}
        method = self._method(picked)
        return values | ({} if method is None else method.settings(pipe, steps))

    def _picked(self, pipe: Any, steps: int) -> Picked:
        pipe.scheduler.set_timesteps(steps)
        every = clean_image(pipe.scheduler).log_snr
        step = median(abs(b - a) for a, b in itertools.pairwise(every))
        task = Task(self.count, steps, step, self.guided, pictures=1, whole=True)
        return pick(self.quality, task)

    def _method(self, picked: Picked) -> Asynchronous | None:
        """The schedule; None where every step is exact."""
        settings = picked.settings
        if settings.get("schedule") != "wavefront":
            return None
        return Asynchronous(
            self.name,
            self.device,
            settings["components"],
            1,
            settings["warmup"],
            schedule="wavefront",
            tail=settings["exact_tail"],
            split=settings["guidance"] == "split",
            compress=self.compress,
        )
