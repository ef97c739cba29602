"""Measure what a generation takes beyond its steps, on one GPU and by asyncdiff.

    python benchmarks/denoise/overhead.py                           # SDXL on two GPUs, in graphs
    python benchmarks/denoise/overhead.py --modes graph compiled --counts 3 10 25 50
    python benchmarks/denoise/overhead.py --device cpu --models tiny --dtype float32  # a try-out

Loops of several numbers of steps are timed in turn; a line is laid through their medians, whose
slope is what a step takes, and whose height at no steps is what the rest takes: what is compared
and copied when a generation begins, what is waited for at its end, and the exact step by which
components fill. Rows are the denoiser in one CUDA graph (on the CPU as it is), all of it as one
rank, and as ``--components`` of them, each without gradients and in inference mode. Random weights,
as in run.py. Printed, and written to ``--out``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import results_file
from denoise.models import MODELS, TINY
from denoise.settings import Setting
from denoise.timings import synchronize
from denoise.ways import Asynchronous, Eager, Graphed, Team


def line(counts: list[int], ms: list[float]) -> tuple[float, float]:
    """The height at 0 and the slope of the line that fits best."""
    slope, height = statistics.linear_regression(counts, ms)
    return height, slope


def measure(key: str, mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """The rows of a model."""
    gpus = torch.cuda.device_count() if args.device == "cuda" else 0
    model, compiled = TINY if key == "tiny" else MODELS[key], mode == "compiled"
    module = model.build("cuda:0" if gpus else "cpu", getattr(torch, args.dtype))
    inputs = model.inputs(module)
    loops = {n: model.loop(inputs, n) for n in args.counts}
    ways: dict[str, Any] = {"plain": Graphed(module, compiled) if gpus else Eager(module)}
    teams = []
    for components in sorted({1, args.components}):
        setting = Setting(components, 1, 1)
        devices = [f"cuda:{r % gpus}" if gpus else "cpu" for r in range(components)]
        teams.append(Team(module, loops[args.counts[0]], setting, devices, compiled))
        ways[f"{components} ranks"] = Asynchronous(teams[-1], setting)
    rows: dict[str, Any] = {}
    for context in ("no_grad", "inference_mode"):
        with getattr(torch, context)():
            ms: dict[str, dict[int, list[float]]] = {w: {n: [] for n in loops} for w in ways}
            for turn in range(args.rounds + 1):  # the first one prepares
                for name, way in ways.items():
                    for n, loop in loops.items():
                        synchronize()
                        begun = time.perf_counter()
                        way.run(loop)
                        synchronize()
                        if turn:
                            ms[name][n].append((time.perf_counter() - begun) * 1e3)
        for name, by_count in ms.items():
            medians = {n: round(statistics.median(each), 3) for n, each in by_count.items()}
            beyond, step = line(list(medians), list(medians.values()))
            row = {"beyond_ms": round(beyond, 2), "ms_a_step": round(step, 3), "ms": medians}
            rows.setdefault(name, {})[context] = row
            print(f"{key}, {mode}, {name}, {context}: {row}", flush=True)
    for team in teams:
        team.denoiser.close()
    return {"title": model.title, "shared_gpus": 0 < gpus < args.components, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["sdxl"])
    parser.add_argument("--modes", nargs="+", choices=("graph", "compiled"), default=["graph"])
    parser.add_argument("--components", type=int, default=2)
    parser.add_argument("--counts", nargs="+", type=int, default=[3, 10, 25, 50])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a try-out")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--out", type=Path, default=results_file.ROOT / "out" / "overhead.json")
    args = parser.parse_args()
    figures = results_file.continued(args.out)
    for key in args.models:
        for mode in args.modes:
            figures[f"{key} {mode}"] = measure(key, mode, args)
            results_file.write(args.out, figures)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
