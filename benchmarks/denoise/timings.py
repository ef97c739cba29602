"""Timed loops, round by round, and what follows from them."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from denoise.settings import Setting
from denoise.ways import Asynchronous


def synchronize() -> None:
    for device in range(torch.cuda.device_count()):
        torch.cuda.synchronize(device)


def timed(way: Any, loop: Any) -> tuple[float, torch.Tensor]:
    """Milliseconds of a loop, or of what else a way runs, from idle GPUs to idle GPUs."""
    synchronize()
    begun = time.perf_counter()
    latents = way.run(loop)
    synchronize()
    return (time.perf_counter() - begun) * 1e3, latents


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


class Timings:
    """What the rounds of one way gave."""

    def __init__(self) -> None:
        self.ms: list[float] = []
        self.exposed: list[float] = []
        self.latents: torch.Tensor | None = None

    def take(self, way: Any, loop: Any) -> None:
        """One round. ArithmeticError if the latents are not finite: it was of nothing then."""
        ms, self.latents = timed(way, loop)
        if not self.latents.isfinite().all():
            raise ArithmeticError("the latents are not finite: what such loops take says nothing")
        self.ms.append(ms)
        if isinstance(way, Asynchronous):
            exposed = way.denoiser.report().exposed_ms_per_tick
            self.exposed += [] if exposed is None else [exposed]

    def figures(self, steps: int) -> dict[str, Any]:
        """Milliseconds a step, and those by which the exchange of a tick was exposed."""
        out: dict[str, Any] = {"ms_a_step": spread([t / steps for t in self.ms])}
        if self.exposed:
            out["exposed_ms_per_tick"] = spread(self.exposed)
        return out

    def ratios(self, base: Timings) -> dict[str, float]:
        """How many times the base's speed, round by round."""
        return spread([b / t for b, t in zip(base.ms, self.ms, strict=False)])

    def distance(self, base: Timings) -> float:
        """Relative L2 distance of the final latents."""
        assert self.latents is not None and base.latents is not None
        a, b = self.latents.double(), base.latents.double()
        return float((a - b).norm() / b.norm())


def steady(
    lengths: dict[int, dict[str, Timings]], name: str, base: str, setting: Setting
) -> dict[str, Any]:
    """What a further step takes, from the two longest loops, round by round; nothing from one."""
    known = [steps for steps in sorted(lengths) if base in lengths[steps]]
    if len(known) < 2:
        return {}
    short, long = known[-2:]
    if name not in lengths[long] or name not in lengths[short]:
        return {}
    ms: dict[str, list[float]] = {}
    for way in (name, base):
        pairs = zip(lengths[long][way].ms, lengths[short][way].ms, strict=False)
        ms[way] = [(b - a) / (long - short) for b, a in pairs]
    if not ms[name]:
        return {}
    best = setting.components * setting.stride * (2 if setting.split else 1)
    return {
        "steady": {
            "ms_a_step": spread(ms[name]),
            f"ms_a_step_{base}": spread(ms[base]),
            "efficiency": spread([b / t / best for t, b in zip(ms[name], ms[base], strict=True)]),
        }
    }
