"""Measure diffusers' own sequence parallelism (Ulysses) on GPUs of one host, beside one of them.

    torchrun --nproc-per-node 2 benchmarks/denoise/ulysses.py                      # FLUX and Wan
    torchrun --nproc-per-node 2 benchmarks/denoise/ulysses.py --device cpu --dtype float32 \\
        --models tiny-flux --ways eager                                            # a try

Each process has the whole denoiser, with the same random weights. A way is how both run: ``eager``,
or ``compiled`` (``compile_repeated_blocks``, as diffusers recommends). Reported are milliseconds of
a call, the medians of ``--rounds`` rounds of ``--calls`` calls, how many times the speed of one GPU
in the same way, and how far results are apart. Attention is cuDNN's, which diffusers' Ulysses
serves and which is the fastest for these sizes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

import results_file
from denoise.models import MODELS, TRIES
from denoise.sequence import of_one

KNOWN = MODELS | TRIES
OUT = Path(os.environ.get("OUT", results_file.ROOT / "benchmarks" / "results"))


def wait(device: torch.device) -> None:
    """Wait for all work of all processes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()


def call_ms(module: Any, inputs: dict[str, Any], rounds: int, calls: int) -> list[float]:
    """Milliseconds of a call in each round."""
    device = next(module.parameters()).device
    for _ in range(3):
        module(**inputs)
    times = []
    for _ in range(rounds):
        wait(device)
        begun = time.perf_counter()
        for _ in range(calls):
            module(**inputs)
        wait(device)
        times.append((time.perf_counter() - begun) / calls * 1e3)
    return times


def figures(one: list[float], several: list[float]) -> dict[str, Any]:
    """Medians with their spread, and the ratio."""
    of = {"one": one, "several": several}
    ms = {name: [round(f(t), 3) for f in (statistics.median, min, max)] for name, t in of.items()}
    return {"ms_a_call": ms, "speedup": round(ms["one"][0] / ms["several"][0], 3)}


def measure(args: argparse.Namespace, key: str, device: torch.device) -> dict[str, Any]:
    """One model, all ways; alike in all processes."""
    from diffusers import ContextParallelConfig

    rows: dict[str, Any] = {}
    for way in args.ways:
        torch.manual_seed(0)
        module: Any = KNOWN[key].build(str(device), getattr(torch, args.dtype))
        torch.manual_seed(1)
        inputs = {n: of_one(x) for n, x in KNOWN[key].inputs(module).items()}
        for weight in [*module.parameters(), *module.buffers()]:
            dist.broadcast(weight.data, 0)
        for value in inputs.values():
            if isinstance(value, torch.Tensor):
                dist.broadcast(value, 0)
        if device.type == "cuda":
            module.set_attention_backend("_native_cudnn")
        if way == "compiled":
            module.compile_repeated_blocks(fullgraph=True)
        want = module(**inputs)[0]
        one = call_ms(module, inputs, args.rounds, args.calls)
        torch._dynamo.reset()
        module.enable_parallelism(
            config=ContextParallelConfig(ulysses_degree=dist.get_world_size())
        )
        got = module(**inputs)[0]
        several = call_ms(module, inputs, args.rounds, args.calls)
        rows[way] = figures(one, several) | {
            "distance_to_plain": round(float((got - want).norm() / want.norm()), 6),
            "processes": dist.get_world_size(),
            "commit": results_file.commit(),
        }
        if dist.get_rank() == 0:
            print(f"{key}, {way}: {rows[way]}", flush=True)
        del module
        torch._dynamo.reset()
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["flux", "wan"], choices=KNOWN)
    parser.add_argument("--ways", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=6)
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a try-out")
    parser.add_argument("--out", type=Path, default=OUT / "ulysses.json")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:  # diffusers asks for the number of devices
        torch.accelerator.device_count = lambda: 1
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    found = results_file.continued(args.out)
    for key in args.models:
        rows = measure(args, key, device)
        found[key] = {"title": KNOWN[key].title, "dtype": args.dtype, **rows}
        if dist.get_rank() == 0:
            results_file.write(args.out, found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
