"""What each way of making pictures faster keeps of them.

    python benchmarks/fidelity/run.py --device cuda:0          # the whole grid on the shipped model
    python benchmarks/fidelity/run.py --quick                  # a few rows, on the CPU
    python benchmarks/fidelity/run.py --only "N=4 .*w=1$"      # rows whose names match
    python benchmarks/fidelity/run.py --pipeline FOLDER --prompts-file FILE --device cuda:0

Every row is one batch of pictures beside those of the plain pipeline from the same noise: PSNR,
SSIM and relative L2 distance, and LPIPS, FID and CLIP score where torchmetrics and their weights
are on the disk. Its speed-up is that of its critical path in MACs (benchmarks/fidelity/method.py):
what its devices allow, links and launches aside; benchmarks/denoise measures times of real
denoisers.

Writes fidelity.json, fidelity_SAMPLER.png (speed-up against PSNR) and fidelity_SAMPLER_sheet.png.
Rows that fidelity.json has already, from the same settings, are kept: a run can be continued.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import results_file
from asyncdiff.cli.subject import chosen
from asyncdiff.demo import model as demo_model
from asyncdiff.tools.fidelity import fidelity, learned_metrics
from fidelity.grid import methods
from fidelity.ours import plain_work
from fidelity.plots import scatter, sheet
from fidelity.rivals import beaten

OUT = Path(os.environ.get("OUT", results_file.ROOT / "benchmarks" / "results"))
#: Sampler steps that each sampler is usually given.
STEPS = {"ddim": 50, "dpm": 25, "euler": 50}


def load(args: argparse.Namespace, sampler: str) -> Any:
    """The pipeline on its device, silent."""
    if args.pipeline is None:
        pipe: Any = demo_model.load(args.device, scheduler=sampler)
    else:
        import diffusers

        pipe = diffusers.DiffusionPipeline.from_pretrained(
            args.pipeline, dtype=getattr(torch, args.dtype), local_files_only=True
        ).to(args.device)
        classes = {
            "ddim": "DDIMScheduler",
            "dpm": "DPMSolverMultistepScheduler",
            "euler": "EulerDiscreteScheduler",
        }
        pipe.scheduler = getattr(diffusers, classes[sampler]).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


#: On how many other prompts waves are calibrated.
CALIBRATION, QUICK_CALIBRATION = 16, 4


def prompts(args: argparse.Namespace) -> list[str]:
    """Evenly spread over those that the shipped model knows, or the lines of a file."""
    return chosen(known_prompts(args), args.prompts)


def other_prompts(args: argparse.Namespace) -> list[str]:
    """Others of the same kind, to calibrate on."""
    drawn = set(prompts(args))
    count = QUICK_CALIBRATION if args.quick else CALIBRATION
    return chosen([p for p in known_prompts(args) if p not in drawn], count)


def known_prompts(args: argparse.Namespace) -> list[str]:
    if args.prompts_file is not None:
        return [line for line in args.prompts_file.read_text().splitlines() if line.strip()]
    return demo_model.known_prompts()


def run_sampler(
    args: argparse.Namespace, sampler: str, steps: int, rows: list[dict[str, Any]], save: Callable
) -> None:
    """All rows of one sampler; ``save`` is called after each."""
    pipe = load(args, sampler)
    texts = prompts(args)
    learned, missing = learned_metrics()
    for why in missing.values():
        print(f"left out: {why}", flush=True)

    def call() -> dict[str, Any]:
        noise = [torch.Generator("cpu").manual_seed(args.seed + i) for i in range(len(texts))]
        return {"prompt": texts, "guidance_scale": args.guidance, "generator": noise}

    with torch.no_grad():
        out = pipe(**call(), num_inference_steps=steps, output_type="pt")
    reference = out.images.float().cpu()
    plain = plain_work(pipe, steps)
    shown = {"plain": reference}
    here = {r["method"]: r for r in rows if (r["sampler"], r["steps"]) == (sampler, steps)}
    for method in methods(args.device, sampler, steps, other_prompts(args), args.quick):
        if args.only and not any(re.search(pattern, method.name) for pattern in args.only):
            continue
        known, settings = here.get(method.name), method.settings(pipe, steps)
        if known is not None and known.get("settings") == settings:
            continue
        if known is not None:
            rows.remove(known)
        begun = time.perf_counter()
        images = method.run(pipe, call(), steps)
        seconds = time.perf_counter() - begun
        close = fidelity(images, reference, texts, learned)
        work = method.work(pipe, call(), steps)
        row = {
            "sampler": sampler,
            "steps": steps,
            "method": method.name,
            "devices": method.devices,
            "settings": settings,
            "speedup": plain.critical / work.critical,
            "macs_per_device": work.per_device,
            "macs_plain": plain.per_device,
            **close.to_dict(),
            "seconds_here": seconds,
        }
        rows.append(row)
        shown[method.name] = images
        save()
        print(
            f"{sampler} {steps}  {method.name:<44} {method.devices} devices  "
            f"{row['speedup']:5.2f}x  {row['psnr_db']:6.2f} dB  SSIM {row['ssim']:.4f}  "
            f"({seconds:.1f} s)",
            flush=True,
        )
    mine = [r for r in rows if (r["sampler"], r["steps"]) == (sampler, steps)]
    for line in beaten(mine):
        print(line)
    scatter(mine, args.out.parent / f"fidelity_{sampler}.png")
    sheet(shown, texts, args.out.parent / f"fidelity_{sampler}_sheet.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samplers", nargs="+", default=["ddim", "dpm"], choices=list(STEPS))
    parser.add_argument("--steps", type=int, help="default: 50, for dpm 25")
    parser.add_argument("--prompts", type=int, default=60, metavar="COUNT")
    parser.add_argument("--prompts-file", type=Path, help="one prompt a line")
    parser.add_argument("--pipeline", help="a local diffusers folder; else the shipped model")
    parser.add_argument("--dtype", default="float16", help="of --pipeline")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="REGEX", help="rows whose names match")
    parser.add_argument("--quick", action="store_true", help="a few rows, eight prompts")
    parser.add_argument("--out", type=Path, default=OUT / "fidelity.json")
    args = parser.parse_args()
    if args.quick:
        args.prompts = min(args.prompts, 8)
    settings = {
        "model": args.pipeline or "the shipped model",
        "prompts": prompts(args),
        "guidance": args.guidance,
        "seed": args.seed,
        "device": args.device,
    }
    rows: list[dict[str, Any]] = []
    if args.out.exists():
        old = json.loads(args.out.read_text())["figures"]
        if old["settings"] == settings:
            rows = old["rows"]

    def save() -> None:
        results_file.write(args.out, {"settings": settings, "rows": rows})

    for sampler in args.samplers:
        run_sampler(args, sampler, args.steps or STEPS[sampler], rows, save)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
