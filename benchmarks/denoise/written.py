"""Measure how long it takes until what is written into a denoiser's weights is on its devices.

    python benchmarks/denoise/written.py                                 # SDXL, all GPUs
    python benchmarks/denoise/written.py --devices cuda:0 cuda:0 --compile
    python benchmarks/denoise/written.py --devices cpu cpu --size 128 --dtype bfloat16

The denoiser has its published configuration and random weights. It is prepared, and then asked for
again after each change: what that takes is what the next generation begins later by. The changes:
none; the state dict loaded again; the scale of a LoRA of rank 16 in all attention moved; that LoRA
replaced by another one; fused anew, as PEFT fuses it. Printed, and written to ``--out``:
milliseconds (median and all), exports that were made for it, bytes of weights. On CPUs ranks are
given copies of the weights, as devices have them, which they otherwise share.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import asyncdiff
import results_file
from asyncdiff.graph.example_inputs import example_inputs
from asyncdiff.graph.weights import Weights
from asyncdiff.runtime.cutting import cutter
from denoise.models import MODELS, TINY

_RANK = 16
_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]


class Exports:
    """Counts exports."""

    def __init__(self) -> None:
        self.count = 0
        self._capture = cutter.capture
        cutter.capture = self._counted

    def _counted(self, *args: Any) -> Any:
        self.count += 1
        return self._capture(*args)


def adapter(module: Any, name: str) -> None:
    """Load a random adapter, as a pipeline does."""
    from peft import LoraConfig

    module.add_adapter(
        LoraConfig(r=_RANK, target_modules=_LAYERS, init_lora_weights="gaussian"), name
    )
    for path, weight in module.named_parameters():
        if "lora_B" in path and f".{name}." in path:
            torch.nn.init.normal_(weight, std=0.02)
    module.requires_grad_(False)


def replaced(module: Any, names: list[str]) -> None:
    """Put another adapter in the place of the one that is there."""
    module.delete_adapters(names[-1])
    names.append(f"{names[-1]}+")
    adapter(module, names[-1])


def changes(module: Any) -> dict[str, list[Callable[[], Any]]]:
    """What is done by name, one after another, each followed by a call; the last is measured."""
    names, scale = ["style"], [1.0]

    def moved() -> None:
        scale[0] *= 0.9
        module.set_adapters([names[-1]], [scale[0]])

    def fused() -> None:
        scale[0] *= 0.9
        module.unfuse_lora()
        module.fuse_lora(scale[0])

    return {
        "nothing": [lambda: None],
        "state dict": [lambda: module.load_state_dict(module.state_dict())],
        "scale": [lambda: adapter(module, names[-1]), moved],
        "replaced": [lambda: replaced(module, names)],
        "fused": [module.fuse_lora, fused],
    }


def measure(args: Any) -> dict[str, Any]:
    model = TINY if args.model == "tiny" else MODELS[args.model]
    exports = Exports()
    cuda = args.devices[0].startswith("cuda")
    if not cuda:
        Weights._shared = staticmethod(lambda weight, device: False)  # type: ignore[method-assign]
    module = model.build(args.devices[0], getattr(torch, args.dtype))
    inputs = example_inputs(module, height=args.size, width=args.size, batch=2)
    nbytes = sum(w.nbytes for w in module.parameters())
    denoiser = asyncdiff.AsyncDenoiser(
        module,
        devices=args.devices,
        components=len(args.devices),
        split="estimate",
        compile=args.compile,
    )

    def asked() -> float:
        began = time.perf_counter()
        denoiser.prepare(**inputs)
        if cuda:
            for device in set(args.devices):
                torch.cuda.synchronize(device)
        return (time.perf_counter() - began) * 1e3

    found: dict[str, Any] = {"weights_bytes": nbytes, "first_ms": round(asked(), 1)}
    for name, (*before, change) in changes(module).items():
        for first in before:
            first()
            asked()
        exports.count, times = 0, []
        for _ in range(args.repeats):
            change()
            times.append(round(asked(), 2))
        found[name] = {
            "ms": statistics.median(times),
            "each_ms": times,
            "exports": exports.count,
        }
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    denoiser.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=["tiny", "sdxl", "sd15", "sd21"], default="sdxl")
    every = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    parser.add_argument("--devices", nargs="+", default=every if len(every) > 1 else every * 2)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--size", type=int, default=1024, help="pixels a side")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=results_file.ROOT / "out" / "written.json")
    args = parser.parse_args()
    figures = results_file.continued(args.out)
    key = f"{args.model} {args.dtype} {args.size} {' '.join(args.devices)}"
    figures[key + (" compiled" if args.compile else "")] = measure(args)
    results_file.write(args.out, figures)


if __name__ == "__main__":
    main()
