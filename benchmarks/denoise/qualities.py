"""Time what ``asyncdiff.parallelize(pipe)`` picks by itself, beside the same pipeline on one GPU.

    python benchmarks/denoise/qualities.py                      # SDXL and others, on all GPUs
    python benchmarks/denoise/qualities.py --models sdxl --samplers dpm --compile regions
    python benchmarks/denoise/qualities.py --device cpu --models tiny --dtype float32  # a try-out

Pipelines of diffusers around the published denoisers with random weights, guidance on, each with
its own sampler and as many steps as are usual (``published_pipelines.py``). A run is one call of
the pipeline, from embeddings to latents. "plain" is diffusers as it is, eager on one GPU; "one GPU"
has the whole denoiser in one CUDA graph there, compiled in the same way as the others. Each way
prepares, draws once more, and is then timed ``--rounds`` times; one GPU before and after the
others, both together are the base. Reported: milliseconds of a run (median, smallest, largest), how
many times one GPU's speed that is (medians), what was picked, what the first call took, and how far
the latents are from the plain ones (exact ways differ by rounding only; the others say little, as
random weights are no model).

What ``--out`` has already, from the same machine and versions, stays in it.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import asyncdiff
import results_file
from asyncdiff.quality import DEFAULT, QUALITIES
from denoise.beside import Lock
from denoise.published_pipelines import PIPELINES, SAMPLERS, build, models
from denoise.timings import Timings, spread, timed

COMPILE: dict[str, bool | str] = {"graphs": False, "regions": "regions", "whole": "whole"}
OUT = Path(os.environ.get("OUT", results_file.ROOT / "benchmarks" / "results"))
#: Two ways beside qualities.
PLAIN, ONE = "plain", "one GPU"


class Way:
    """A pipeline, as it is spread now."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def run(self, call: dict[str, Any]) -> torch.Tensor:
        """The latents of a call, of always the same noise."""
        latents: torch.Tensor = self._pipe(**call, generator=torch.Generator().manual_seed(1))[0]
        return latents


def measure(
    args: argparse.Namespace, key: str, sampler: str, compile: str, lock: Lock
) -> dict[str, Any]:
    """The rows of a model with one sampler, all of them compiled alike."""
    lock.prepare()
    gpus = torch.cuda.device_count() if args.device == "cuda" else 0
    home = "cuda:0" if gpus else "cpu"
    devices = [f"cuda:{r % gpus}" if gpus else "cpu" for r in range(args.devices or gpus or 2)]
    pipe, call = build(key, sampler, home, getattr(torch, args.dtype))
    call["num_inference_steps"] = args.steps or SAMPLERS[sampler][2]
    way, plain = Way(pipe), Timings()
    taken: dict[str, Timings] = {}
    rows: dict[str, Any] = {}
    for name in (PLAIN, ONE, *args.qualities, ONE):
        if args.over() and ONE in rows:
            print(f"   {name}: no time was left", flush=True)
            continue
        lock.prepare()
        handle = None
        if name != PLAIN:
            handle = asyncdiff.parallelize(
                pipe,
                devices[:1] if name == ONE else devices,
                quality="exact" if name == ONE else name,
                compile=COMPILE[compile],
            )
        first_ms, _ = timed(way, call)
        lock.time()
        timed(way, call)  # clocks rise
        timings = taken.setdefault(name, plain if name == PLAIN else Timings())
        for _ in range(1 if name == PLAIN else args.rounds):
            timings.take(way, call)
        lock.free()
        row = rows.setdefault(name, {"first_s": round(first_ms / 1e3, 1)})
        row |= {"ms": spread(timings.ms), "distance": timings.distance(plain)}
        row["commit"] = results_file.commit()
        if handle is not None:
            row["picked"] = handle.settings
            handle.restore()
        del handle
        gc.collect()
    for row in rows.values():
        row["speedup"] = round(rows[ONE]["ms"]["median"] / row["ms"]["median"], 3)
    return {
        "title": models()[key].title,
        "sampler": sampler,
        "compile": compile,
        "steps": call["num_inference_steps"],
        "dtype": args.dtype,
        "devices": devices,
        "shared_gpus": gpus < len(devices),
        "ways": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    standard = [key for key in PIPELINES if not key.startswith("tiny")]
    parser.add_argument("--models", nargs="+", default=standard, choices=PIPELINES)
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, help="those that serve a model")
    parser.add_argument(
        "--qualities", nargs="+", default=[DEFAULT, "high", "exact"], choices=QUALITIES
    )
    parser.add_argument("--compile", nargs="+", default=["graphs", "regions"], choices=COMPILE)
    parser.add_argument("--steps", type=int, help="instead of the sampler's usual number")
    parser.add_argument("--devices", type=int, help="so many (all GPUs)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a try-out")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--lock", type=Path, help="of runs beside each other (beside.py)")
    parser.add_argument("--out", type=Path, default=OUT / "qualities.json")
    args = parser.parse_args()
    lock, started = Lock(args.lock), time.monotonic()
    args.over = lambda: time.monotonic() - started > args.seconds
    figures = results_file.continued(args.out)
    for key in args.models:
        served = PIPELINES[key].samplers
        for sampler in [s for s in args.samplers or served[:1] if s in served]:
            for compile in args.compile:
                name = f"{key}, {sampler}, {compile}"
                if args.over():
                    print(f"{name}: no time was left", flush=True)
                    continue
                figures[name] = measure(args, key, sampler, compile, lock)
                results_file.write(args.out, figures)
                for way, row in figures[name]["ways"].items():
                    print(f"{name}, {way}: {row}", flush=True)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
