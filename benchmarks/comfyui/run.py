"""Time ComfyUI's own sampler on its own SDXL, plainly and through the node, and compare latents.

    COMFYUI=/path/to/ComfyUI python benchmarks/comfyui/run.py                     # on two GPUs
    COMFYUI=/path/to/ComfyUI python benchmarks/comfyui/run.py --device cpu --model tiny --steps 4

Wants ComfyUI's requirements, of which torchvision, torchaudio and av may be missing: nothing here
uses them. The model has ComfyUI's configuration of SDXL with random weights, at 1024² with
guidance: speed does not depend on weights. A run is one call of ``comfy.sample.sample`` in
inference mode, as ComfyUI's own KSampler makes it. "plain" is ComfyUI's own, eager on the first
device; the others go through the node with these settings. Each way runs once untimed, which
prepares; then ways alternate in ``--rounds`` rounds. Reported are seconds of a run (median,
smallest, largest), how many times plain's speed that is, what the first run took, the largest
difference of the latents from plain's over their largest value, and what each GPU holds while ways
run and after all is unloaded.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from comfyui.loading import load_pack, open_comfyui

import results_file

FOLDER = os.environ.get("COMFYUI", "")
#: What ComfyUI finds out of a checkpoint of SDXL.
SDXL = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "num_head_channels": 64,
    "use_spatial_transformer": True,
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "context_dim": 2048,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "use_temporal_attention": False,
    "legacy": False,
}
TINY = SDXL | {
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "num_head_channels": 16,
    "transformer_depth": [0, 2],
    "transformer_depth_output": [0, 0, 2, 2],
    "transformer_depth_middle": 1,
}
#: By name its configuration, and the latents' height and width.
MODELS = {"sdxl": (SDXL, 128), "tiny": (TINY, 16)}
#: A node's inputs, where they are not its defaults: of the one by quality, where there is one, else
#: of that by hand. With as many warm-up steps as there are, all are exact.
WAYS: dict[str, dict[str, Any]] = {
    "exact": {"warmup": 10_000, "exact_tail": 0, "schedule": "asyncdiff"},
    "conditions split": {"guidance": "split", "components": 1, "warmup": 10_000, "exact_tail": 0},
    "defaults": {},
    "balanced": {"quality": "balanced"},
}
TOKENS = 77


def build(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """ComfyUI's MODEL of this configuration, with random weights."""
    import comfy.model_patcher
    import comfy.supported_models

    of = comfy.supported_models.SDXL({**config, "dtype": dtype})
    of.set_inference_dtype(dtype, None)
    torch.manual_seed(0)
    model = of.get_model({}, "")
    with torch.no_grad():
        for weight in model.diffusion_model.parameters():
            fan = weight[0].numel() if weight.dim() > 1 else 0
            weight.normal_(std=fan**-0.5) if fan else weight.fill_(0.02)
    return comfy.model_patcher.ModelPatcher(model, device, torch.device("cpu"))


def sample(model: Any, side: int, args: argparse.Namespace) -> torch.Tensor:
    """Latents that ComfyUI's sampler draws of random conditions."""
    import comfy.sample

    random = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 4, side, side, generator=random)
    conditions = [
        [
            [
                torch.randn(1, TOKENS, SDXL["context_dim"], generator=random),
                {"pooled_output": torch.randn(1, 1280, generator=random)},
            ]
        ]
        for _ in range(2)
    ]
    drawn: torch.Tensor = comfy.sample.sample(
        *(model, noise, args.steps, 5.0, args.sampler, "normal", *conditions),
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=1,
    )
    return drawn


def held() -> list[int]:
    """Bytes that each GPU holds for torch."""
    return [torch.cuda.memory_allocated(i) for i in range(torch.cuda.device_count())]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of all ways."""
    import comfy.model_management

    from asyncdiff.phases import recording

    config, side = MODELS[args.model]
    gpu = args.device == "cuda"
    home = torch.device("cuda:0") if gpu else torch.device("cpu", 0)
    model = build(config, home, torch.float16 if gpu else torch.float32)
    gpus = torch.cuda.device_count()
    devices = ", ".join(f"cuda:{r % gpus}" if gpu else "cpu" for r in range(2))
    nodes = {name: kind() for name, kind in load_pack().NODE_CLASS_MAPPINGS.items()}
    compile = {"compile": "on" if args.compile else "off"}
    figures: dict[str, Any] = {"steps": args.steps, "sampler": args.sampler, "devices": devices}
    figures["ways"] = {}
    drawn: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        models = {"plain": model}
        for name in args.ways:
            node = "AsyncDiffByQuality" if "quality" in WAYS[name] else "AsyncDiffParallel"
            given = {"devices": devices, **compile, **WAYS[name]}
            models[name] = nodes[node].spread(model, **given)[0]
        for name in [*models, "plain"]:
            with recording() as spent:
                begun = time.perf_counter()
                drawn[name] = sample(models[name], side, args)
                first = round(time.perf_counter() - begun, 2)
            row = figures["ways"].setdefault(name, {"first_s": first, "s": []})
            row["phases_s"] = {phase: round(s, 2) for phase, s in spent.in_order().items()}
            for _ in range(args.rounds):
                begun = time.perf_counter()
                sample(models[name], side, args)
                row["s"].append(time.perf_counter() - begun)
            if gpu:
                row["held_bytes"] = held()
        models.clear()
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
        if gpu:
            figures["held_bytes_afterwards"] = held()
    plain = statistics.median(figures["ways"]["plain"]["s"])
    for name, row in figures["ways"].items():
        row["times_plain"] = round(plain / statistics.median(row["s"]), 3)
        row["s"] = {
            "median": round(statistics.median(row["s"]), 4),
            "min": round(min(row["s"]), 4),
            "max": round(max(row["s"]), 4),
        }
        off = (drawn[name] - drawn["plain"]).abs().max() / drawn["plain"].abs().max()
        row["distance_to_plain"] = float(off)
        print(f"{name}: {row}", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="sdxl", choices=MODELS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--sampler", default="euler")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a try-out")
    parser.add_argument("--out", type=Path, default=results_file.ROOT / "out" / "comfyui.json")
    args = parser.parse_args()
    if not FOLDER:
        raise SystemExit("COMFYUI has to name ComfyUI's folder")
    open_comfyui(FOLDER, args.device == "cpu")
    figures = results_file.continued(args.out)
    figures[args.model + ("-compiled" if args.compile else "")] = measure(args)
    results_file.write(args.out, figures)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
