"""Time the same denoising loop on the same GPUs by one process, and by a process for each.

    torchrun --nproc-per-node 2 benchmarks/denoise/processes.py            # SD 2.1 and SDXL, N=2
    torchrun --nproc-per-node 2 benchmarks/denoise/processes.py --models sdxl --modes compiled
    torchrun --nproc-per-node 2 benchmarks/denoise/processes.py --hosts    # as if on two hosts
    torchrun --nproc-per-node 2 benchmarks/denoise/processes.py --device cpu --models tiny \
        --dtype float32 --modes graph --steps 6    # a try-out

Random weights, as in run.py. Rounds of the processes together, then rounds of process 0 alone with
all of the GPUs, which the others have left, then of the processes again. Printed, and written to
``--out``: milliseconds a loop (medians, smallest, largest), the processes' over the one's, whether
both computed the same bits. With ``--hosts`` each process counts as one on a host of its own, so
that they exchange over the network (NCCL; TCP on the CPU); the one process goes on as ever. Process
r has rank r, and the last one the ranks that are left.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import asyncdiff
import results_file
from denoise.models import MODELS, TINY, Published
from denoise.settings import Setting
from denoise.timings import Timings, spread
from denoise.ways import Asynchronous


class _Team:
    """What :class:`~denoise.ways.Asynchronous` needs of a team."""

    def __init__(self, denoiser: asyncdiff.AsyncDenoiser) -> None:
        self.denoiser = denoiser


def rounds(
    module: Any, inputs: Any, model: Published, setting: Setting, args: Any, **where: Any
) -> tuple[Timings, asyncdiff.AsyncDenoiser]:
    """So many rounds with ranks as ``where`` says, after one that prepares."""
    denoiser = asyncdiff.AsyncDenoiser(
        module, components=setting.components, stride=setting.stride, **where
    )
    way, timings = Asynchronous(_Team(denoiser), setting), Timings()
    way.run(model.loop(inputs, args.steps))
    for _ in range(args.rounds):
        timings.take(way, model.loop(inputs, args.steps))
    return timings, denoiser


def compare(model: Published, setting: Setting, mode: str, args: Any) -> dict[str, Any]:
    """The figures of a model; those of process 0 count."""
    rank = dist.get_rank()
    gpu = args.device == "cuda"
    home = f"cuda:{torch.cuda.current_device()}" if gpu else "cpu"
    module = model.build(home, getattr(torch, args.dtype))
    inputs = model.inputs(module)
    options = {"compile": mode == "compiled", "deadline": 60.0}
    gpus, processes = torch.cuda.device_count(), dist.get_world_size()
    owners = [min(r, processes - 1) for r in range(setting.ranks)]
    devices = [f"cuda:{p % gpus}" if gpu else "cpu" for p in owners]
    mine = [device for device, p in zip(devices, owners, strict=True) if p == rank]
    own = {"group": "env", "devices": mine}
    before, denoiser = rounds(module, inputs, model, setting, args, **own, **options)
    cuts = list(denoiser.partition.cuts or ())
    denoiser.close()
    gc.collect()
    options["split"] = cuts or "estimate"
    if rank == 0:
        alone, one = rounds(module, inputs, model, setting, args, devices=devices, **options)
        one.close()
        gc.collect()
    if gpu:
        torch.cuda.empty_cache()
    dist.barrier()
    after, denoiser = rounds(module, inputs, model, setting, args, **own, **options)
    denoiser.close()
    if rank != 0:
        return {}
    assert before.latents is not None and alone.latents is not None and after.latents is not None
    several, exposed = before.ms + after.ms, before.exposed + after.exposed
    late = {"exposed_ms_per_tick": spread(exposed)} if exposed else {}
    return late | {
        "hosts": args.hosts,
        "devices": devices,
        "shared_gpus": gpu and gpus < setting.ranks,
        "processes_ms": spread(several),
        "one_process_ms": spread(alone.ms),
        "ratio": round(statistics.median(several) / statistics.median(alone.ms), 4),
        "same_bits": torch.equal(after.latents, alone.latents.to(after.latents.device)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["sd21", "sdxl"])
    parser.add_argument("--setting", type=Setting.parse, default=Setting(2, 1, 1))
    parser.add_argument("--modes", nargs="+", choices=("graph", "compiled"), default=["graph"])
    parser.add_argument("--hosts", action="store_true", help="a host for each process: see above")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--out", type=Path, default=results_file.ROOT / "out" / "processes.json")
    args = parser.parse_args()
    host, shared = f"host-{os.environ['RANK']}", False
    if args.device == "cuda":
        gpus = torch.cuda.device_count()
        shared = gpus < int(os.environ["LOCAL_WORLD_SIZE"])
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
    if args.hosts:
        os.environ["ASYNCDIFF_HOST"] = host
        if shared:  # NCCL refuses two processes of one host on one GPU
            os.environ["NCCL_HOSTID"] = host
    dist.init_process_group("gloo")
    figures: dict[str, Any] = {}
    for name in args.models:
        model = TINY if name == "tiny" else MODELS[name]
        for mode in args.modes:
            found = compare(model, args.setting, mode, args)
            if found:
                figures[f"{name} {args.setting.name} {mode}"] = found
                print(f"{name}, {args.setting.name}, {mode}: {found}", flush=True)
                results_file.write(args.out, figures)  # also where the rest is cut off
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
