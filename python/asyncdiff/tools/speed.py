"""How fast devices are: what a matrix product and a pass over memory do on each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

#: Rows of the matrices, and bytes that are copied, on a GPU.
_ROWS, _BYTES = 8192, 1 << 28
#: Timed runs, after one that warms up.
_RUNS = 7


def rates(device: torch.device, rows: int = _ROWS, nbytes: int = _BYTES) -> dict[str, float]:
    """``tflops`` of a product of matrices of ``rows`` rows (float16; float32 on a CPU), and
    ``gb_per_s`` that a copy of ``nbytes`` reads and writes on ``device``: medians. Raises what
    torch does, where there is no memory for it too."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    a = torch.randn(rows, rows, device=device, dtype=torch.float32).to(dtype)
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target, out = torch.empty_like(source), torch.empty_like(a)
    product = _seconds(lambda: torch.mm(a, a, out=out), device)
    copy = _seconds(lambda: target.copy_(source), device)
    return {
        "tflops": round(2 * rows**3 / product / 1e12, 3),
        "gb_per_s": round(2 * nbytes / copy / 1e9, 1),
    }


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    times = []
    for _ in range(_RUNS + 1):
        begun = now()
        work()
        times.append(max(now() - begun, 1e-9))
    return statistics.median(times[1:])


def compare(found: list[dict[str, float]]) -> list[float]:
    """How fast each device is by its rates, 1 the fastest: the mean of both, geometric, since a
    denoiser is some of either."""
    means = [(r["tflops"] * r["gb_per_s"]) ** 0.5 for r in found]
    most = max(means, default=0.0)
    return [round(m / most, 3) if most > 0 else 1.0 for m in means]
