"""Time whole denoising loops of published denoisers, three ways side by side.

    python benchmarks/denoise/run.py                    # SD 2.1 and SDXL, N=2 on two GPUs
    python benchmarks/denoise/run.py --models flux --schedules 2,1,1 2,2,1 --rounds 3
    python benchmarks/denoise/run.py --modes graph      # without what is compiled

Random weights at the published sizes, fp16, guidance on (a batch of two; FLUX has none), DDIM.
Each round runs, on one GPU, (a) eager, (b) the whole denoiser in a CUDA graph, (c) the same
compiled by torch.compile; and (d) asyncdiff with each schedule, with and without compiled
components; one after another. A ratio is taken within a round, against the single GPU in the same
mode and against eager. Reported: medians, with the smallest and the largest. Memory is measured
while nothing else lies on the GPUs. ``efficiency_alone`` is the single GPU's time over N times the
slowest component's, each alone in a CUDA graph: what the partition allows, before any exchange.

With fewer GPUs than ranks the ranks share them: the exchange is then tested, and the components'
own times are still measured, but no speedup is reported.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import results_file
from denoise.loop import Loop
from denoise.models import MODELS, Published
from denoise.ways import Asynchronous, Eager, Graphed, component_times

#: How (b), (c) and (d) run, and what is added to the names of schedules.
SUFFIX = {"graph": "", "compiled": ", compiled"}
OUT = Path(os.environ.get("OUT", results_file.ROOT / "benchmarks" / "results"))


def synchronize() -> None:
    for device in range(torch.cuda.device_count()):
        torch.cuda.synchronize(device)


def timed(way: Any, loop: Loop) -> tuple[float, torch.Tensor]:
    """Milliseconds of a loop, from idle GPUs to idle GPUs."""
    synchronize()
    begun = time.perf_counter()
    latents = way.run(loop)
    synchronize()
    return (time.perf_counter() - begun) * 1e3, latents


class Memory:
    """Bytes that came to lie on each GPU since this was made."""

    def __init__(self) -> None:
        self._devices = range(torch.cuda.device_count())
        gc.collect()
        synchronize()
        torch.cuda.empty_cache()
        self._used = [self._in_use(d) for d in self._devices]
        self._allocated = [torch.cuda.memory_allocated(d) for d in self._devices]
        for d in self._devices:
            torch.cuda.reset_peak_memory_stats(d)

    @staticmethod
    def _in_use(device: int) -> int:
        free, total = torch.cuda.mem_get_info(device)
        return total - free

    def taken(self) -> dict[str, list[float]]:
        """MiB by GPU: ``device`` all that is taken from it, torch's cache included; ``peak`` the
        most that torch's tensors took."""
        pairs = zip(self._devices, self._used, self._allocated, strict=True)
        device, peak = [], []
        for d, used, allocated in pairs:
            device.append(round((self._in_use(d) - used) / 2**20, 1))
            peak.append(round((torch.cuda.max_memory_allocated(d) - allocated) / 2**20, 1))
        return {"device": device, "peak": peak}


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def run_model(
    model: Published,
    schedules: list[tuple[int, int, int]],
    steps: int,
    rounds: int,
    dtype: torch.dtype,
    modes: list[str],
) -> dict[str, Any]:
    gpus = torch.cuda.device_count()
    home = "cuda:0"
    ways: dict[str, Any] = {}
    figures: dict[str, Any] = {"title": model.title, "steps": steps, "rounds": rounds}
    figures["dtype"] = str(dtype).removeprefix("torch.")
    print(f"== {model.title}: {steps} steps, {rounds} rounds", flush=True)

    memory: dict[str, Any] = {}
    for (n, s, w), mode in itertools.product(schedules, modes):
        name = f"N={n} S={s} w={w}" + SUFFIX[mode]
        ranks = n + s - 1
        module = model.build(home, dtype)
        inputs = model.inputs(module)
        module.to("cpu")
        before = Memory()
        begun = time.perf_counter()
        devices = [f"cuda:{r % gpus}" for r in range(ranks)]
        way = Asynchronous(
            module,
            inputs,
            devices=devices,
            components=n,
            stride=s,
            warmup=w,
            compile=mode == "compiled",
        )
        loop = Loop(inputs, steps)
        way.run(loop)
        synchronize()
        seconds = time.perf_counter() - begun
        memory[name] = before.taken()
        report = way.denoiser.report()
        partition = way.denoiser.partition.report()
        ways[name] = way
        figures[name] = {
            "devices": devices,
            "shared_gpus": gpus < ranks,
            "first_generation_s": round(seconds, 1),
            "mode": mode,
            "cuda_graphs": report.cuda_graphs,
            "compiled": report.compiled,
            "compile_s": round(report.compile_s, 1),
            "exchange_mib_per_tick": round(report.exchange_bytes_per_tick / 2**20, 2),
            "partition": partition.to_dict(),
        }
        print(f"   {name}: prepared in {seconds:.1f} s\n{partition}", flush=True)

    before = Memory()
    module = model.build(home, dtype)
    loop = Loop(model.inputs(module), steps)
    ways["eager"] = Eager(module)
    ways["eager"].run(loop)
    memory["eager"] = before.taken()
    for mode in modes:
        begun = time.perf_counter()
        ways[mode] = Graphed(module, loop.inputs, compile=mode == "compiled")
        ways[mode].run(loop)
        figures[mode] = {"first_generation_s": round(time.perf_counter() - begun, 1)}
        print(f"   one GPU, {mode}: {figures[mode]}", flush=True)
    order = ["eager", *modes, *(k for k in ways if k not in ("eager", *modes))]

    times: dict[str, list[float]] = {name: [] for name in order}
    exposed: dict[str, list[float]] = {name: [] for name in order}
    result: dict[str, torch.Tensor] = {}
    for _ in range(rounds):
        for name in order:
            ms, result[name] = timed(ways[name], loop)
            times[name].append(ms / steps)
            if isinstance(ways[name], Asynchronous):
                value = ways[name].denoiser.report().exposed_ms_per_tick
                if value is not None:
                    exposed[name].append(value)

    for name in order:
        entry = figures.setdefault(name, {})
        entry["ms_a_step"] = spread(times[name])
        entry["memory_mib"] = memory.get(name)
        if exposed[name]:
            entry["exposed_ms_per_tick"] = spread(exposed[name])
        for base in dict.fromkeys(("eager", entry.get("mode", "eager"))):
            if name != base and not entry.get("shared_gpus"):
                ratios = [b / t for b, t in zip(times[base], times[name], strict=True)]
                entry[f"speedup_over_{base}"] = spread(ratios)
        if isinstance(ways[name], Asynchronous):
            alone = component_times(ways[name].denoiser)
            parts = max(alone[: ways[name].denoiser.components])
            entry["component_ms_alone"] = [round(t, 3) for t in alone]
            best = statistics.median(times[entry["mode"]])
            entry["efficiency_alone"] = round(best / parts / ways[name].denoiser.components, 3)
        a, b = result[name].double(), result["eager"].double()
        entry["distance_to_eager"] = float((a - b).norm() / b.norm())
        print(f"   {name}: " + "  ".join(f"{k} {v}" for k, v in entry.items() if k != "partition"))
    sys.stdout.flush()
    for way in ways.values():
        if isinstance(way, Asynchronous):
            way.denoiser.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["sd21", "sdxl"], choices=list(MODELS))
    parser.add_argument(
        "--schedules", nargs="+", default=["2,1,1"], metavar="N,S,w", help="asynchronous schedules"
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--modes", nargs="+", default=list(SUFFIX), choices=list(SUFFIX))
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument("--out", type=Path, default=OUT / "denoise.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU: on a CPU its times would say nothing")
    schedules = [tuple(int(x) for x in s.split(",")) for s in args.schedules]
    figures = {}
    for key in args.models:
        figures[key] = run_model(
            MODELS[key], schedules, args.steps, args.rounds, getattr(torch, args.dtype), args.modes
        )
        results_file.write(args.out, figures)
        gc.collect()
        torch.cuda.empty_cache()
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
