"""Measure what each process holds while a denoiser is loaded from its checkpoint, component by
component: host memory and memory of its GPU.

    torchrun --nproc-per-node 2 benchmarks/denoise/loading.py                  # SDXL and FLUX
    torchrun --nproc-per-node 2 benchmarks/denoise/loading.py --device cpu --models tiny

Process 0 writes a checkpoint of the published size with random weights, a layer's at a time. Then
every process builds the denoiser on the meta device, is given that checkpoint, and makes one small
step (``--size`` pixels a side: activations are not what is measured). Where there are fewer GPUs
than processes they share one. The published denoisers go through a tiny one of the same kind first,
so that libraries and kernels are there. Printed, and written to ``--out``: bytes of each process's
component, the most by which its host memory (VmHWM) and its tensors on the GPU exceeded what it had
before, and both over the component's.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import asyncdiff
import results_file
from asyncdiff.graph.example_inputs import example_inputs
from denoise.models import MODELS, TINY, Published

#: Bytes of a file of the checkpoint.
_SHARD = 2 << 30
#: A smaller denoiser of the same kind: the same libraries and kernels.
_SMALLER: dict[str, dict[str, Any]] = {
    "sdxl": {"block_out_channels": (64, 128, 256), "attention_head_dim": [2, 4, 8]},
    "flux": {"num_layers": 1, "num_single_layers": 1},
    "tiny": {},
}
_TIMES = (900.0, 300.0)


def write_checkpoint(module: torch.nn.Module, folder: Path) -> int:
    """Random values for all weights of a module on the meta device, as sharded files; the bytes."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    held = total = 0
    weight_map = {}

    def save() -> None:
        save_file(shards[-1], folder / f"model-{len(shards)}.safetensors")
        shards[-1] = {}

    for name, weight in module.state_dict().items():
        if held > _SHARD:
            save()
            shards.append({})
            held = 0
        value = torch.empty(weight.shape, dtype=weight.dtype)
        value.uniform_(-0.02, 0.02) if value.is_floating_point() else value.zero_()
        shards[-1][name] = value
        weight_map[name] = f"model-{len(shards)}.safetensors"
        held += value.nbytes
        total += value.nbytes
    save()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def on_meta(model: Published, changed: dict[str, Any], dtype: torch.dtype) -> torch.nn.Module:
    import diffusers

    with torch.device("meta"):
        module = getattr(diffusers, model.cls)(**(model.config | changed))
    torch.nn.Module.to(module, dtype)
    return module.eval().requires_grad_(False)


def load(
    model: Published, changed: dict[str, Any], folder: Path, args: Any
) -> asyncdiff.AsyncDenoiser:
    """A denoiser from a checkpoint, after a few steps."""
    module = on_meta(model, changed, getattr(torch, args.dtype))
    denoiser = asyncdiff.AsyncDenoiser(
        module,
        components=dist.get_world_size(),
        group="env",
        checkpoint=folder,
        split="estimate",
        compile=False,
        deadline=120.0,
        **where(args),
    )
    on_meta_too = example_inputs(module, height=args.size, width=args.size, batch=1)
    inputs = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda v: torch.full_like(v, 0.5, device=home(args)), on_meta_too
    )
    times = torch.tensor(_TIMES) / model.timestep_divisor
    with torch.no_grad(), denoiser.generation(times):
        for t in times:
            now = torch.full_like(inputs["timestep"], float(t))
            denoiser(**(inputs | {"timestep": now}))
    return denoiser


def home(args: Any) -> torch.device:
    if args.device == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


def where(args: Any) -> dict[str, Any]:
    return {"devices": [str(home(args))]} if args.device == "cuda" else {}


def of_status(key: str) -> int:
    """A size in /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def tensors(args: Any) -> int:
    """Bytes of tensors on this process's GPU."""
    return torch.cuda.memory_allocated(home(args)) if args.device == "cuda" else 0


def measure(key: str, args: Any) -> dict[str, Any]:
    """The figures of this process."""
    model = TINY if key == "tiny" else MODELS[key]
    dtype = getattr(torch, args.dtype)
    box = [tempfile.mkdtemp(dir=args.folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    folder = Path(str(box[0]))
    whole = 0
    for name, changed in (("small", _SMALLER[key]), ("whole", {})):
        (folder / name).mkdir(exist_ok=True)
        if dist.get_rank() == 0:
            whole = write_checkpoint(on_meta(model, changed, dtype), folder / name)
    dist.barrier()
    load(model, _SMALLER[key], folder / "small", args).close()
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(home(args))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    host, device = of_status("VmRSS"), tensors(args)
    started = time.perf_counter()
    denoiser = load(model, {}, folder / "whole", args)
    seconds = time.perf_counter() - started
    grown = {"host": of_status("VmHWM") - host}
    if args.device == "cuda":
        grown["device"] = torch.cuda.max_memory_allocated(home(args)) - device
    partition = denoiser.partition
    weights = partition.captured.weights
    mine = sum(weights[w].nbytes for w in partition.components[dist.get_rank()].weights)
    denoiser.close()
    gc.collect()
    found = {
        "component_bytes": mine,
        "grown_bytes": grown,
        "over_component": {k: round(v / mine, 3) for k, v in grown.items()},
        "seconds": round(seconds, 1),
    }
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, found)
    if dist.get_rank() == 0:
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()
    return {"whole_bytes": whole, "processes": everybody}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=sorted(_SMALLER), default=["sdxl", "flux"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--folder", type=Path, default=None, help="where checkpoints are written")
    parser.add_argument("--out", type=Path, default=results_file.ROOT / "out" / "loading.json")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.device == "cuda":
        torch.cuda.set_device(home(args))
    dist.init_process_group("gloo")
    figures = {}
    for key in args.models:
        figures[key] = measure(key, args)
        if dist.get_rank() == 0:
            print(f"{key}: {json.dumps(figures[key])}", flush=True)
            results_file.write(args.out, figures)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
