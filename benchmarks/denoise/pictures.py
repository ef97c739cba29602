"""Pictures a second of several at once: schedule "pipeline" beside one GPU.

    python benchmarks/denoise/pictures.py                              # SD 2.1 and SDXL, N = GPUs
    python benchmarks/denoise/pictures.py --models sdxl --pictures 2 4 --modes graph compiled
    python benchmarks/denoise/pictures.py --device cpu --models tiny --dtype float32  # a try-out

Random weights at the published sizes, guidance on, DDIM. Each round runs the whole batch on one
GPU, in one CUDA graph or compiled, and on all GPUs in turn; a ratio is taken within a round.
Reported: medians, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import asyncdiff
import results_file
from asyncdiff.graph.example_inputs import example_inputs
from denoise.loop import Loop
from denoise.models import MODELS, TINY
from denoise.timings import synchronize
from denoise.ways import Eager, Graphed

OUT = Path(os.environ.get("OUT", results_file.ROOT / "benchmarks" / "results"))


class Pipeline:
    """All devices, in turn."""

    def __init__(self, module: Any, inputs: dict[str, Any], devices: list[str], compile: bool):
        # A copy: its weights leave the GPU, and the other way's graph reads them there.
        self.denoiser = asyncdiff.AsyncDenoiser(
            copy.deepcopy(module).to("cpu") if devices[0] != "cpu" else module,
            devices=devices,
            components=len(devices),
            schedule="pipeline",
            compile=compile,
        )

    def run(self, loop: Loop) -> torch.Tensor:
        with self.denoiser.generation(loop.timesteps):
            return loop(lambda kwargs, _: self.denoiser(**kwargs)[0]).clone()


def figures_of(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def run_model(args: argparse.Namespace, key: str, pictures: int, mode: str) -> dict[str, Any]:
    model = MODELS.get(key, TINY)
    gpus = torch.cuda.device_count() if args.device == "cuda" else 0
    home = "cuda:0" if gpus else "cpu"
    devices = [f"cuda:{g}" for g in range(gpus)] if gpus > 1 else [home] * 2
    module = model.build(home, getattr(torch, args.dtype))
    inputs = example_inputs(
        module, height=model.height, width=model.width, frames=model.frames, batch=2 * pictures
    )
    loop = Loop(inputs, args.steps, timestep_divisor=model.timestep_divisor, pictures=pictures)
    one: Any = Graphed(module, mode == "compiled") if gpus else Eager(module)
    many = Pipeline(module, inputs, devices, mode == "compiled")
    ways = {"one": one, "pipeline": many}
    results = {name: way.run(loop).float() for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            synchronize()
            begun = time.perf_counter()
            way.run(loop)
            synchronize()
            times[name].append(time.perf_counter() - begun)
    ratios = [a / b for a, b in zip(times["one"], times["pipeline"], strict=True)]
    distance = (results["pipeline"] - results["one"]).norm() / results["one"].norm()
    out = {
        "title": model.title,
        "mode": mode,
        "pictures": pictures,
        "devices": devices,
        "shared_gpus": len(set(devices)) < len(devices),
        "steps": args.steps,
        "ms_a_step": {n: figures_of([1e3 * t / args.steps for t in v]) for n, v in times.items()},
        "times_one_gpu": figures_of(ratios),
        "distance": float(distance),
        "commit": results_file.commit(),
    }
    many.denoiser.close()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["sd21", "sdxl"], choices=[*MODELS, "tiny"])
    parser.add_argument("--pictures", type=int, nargs="+", help="default: as many as GPUs")
    parser.add_argument("--modes", nargs="+", default=["graph"], choices=["graph", "compiled"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    count = max(2, torch.cuda.device_count()) if args.device == "cuda" else 2
    out = args.out or OUT / f"pictures_{count}gpu.json"
    rows = []
    for key in args.models:
        for mode in args.modes:
            for pictures in args.pictures or [count]:
                rows.append(run_model(args, key, pictures, mode))
                print(rows[-1], flush=True)
                results_file.write(out, {"rows": rows})


if __name__ == "__main__":
    main()
