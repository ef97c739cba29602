"""What each way of making pictures faster keeps of them.

    python benchmarks/fidelity/run.py --model unet --device cuda:0   # the whole grid
    python benchmarks/fidelity/run.py --quick                        # a few rows, on the CPU
    python benchmarks/fidelity/run.py --only "N=4 .*w=1$"            # rows whose names match
    python benchmarks/fidelity/run.py --model unet --samplers euler --steps 4 8 12 --guidance 1 2
    python benchmarks/fidelity/run.py --pipeline FOLDER --prompts-file FILE --device cuda:0

Every row is one batch of pictures beside those of the plain pipeline from the same noise: PSNR,
SSIM and relative L2 distance, and LPIPS, FID and CLIP score where torchmetrics and their weights
are on the disk. Its speed-up is that of its critical path in MACs (benchmarks/fidelity/method.py):
what its devices allow, links and launches aside; benchmarks/denoise measures times of real
denoisers.

Writes fidelity_MODEL.json, beside it _SAMPLER_STEPS_GUIDANCE.png (speed-up against PSNR) and the
same with _sheet.png.
Rows that the JSON has already, from the same settings, are kept: a run can be continued. On a
machine with many cores several runs with an ``--out`` each go beside each other; a last one with
``--take FILES`` puts their rows into one file:

    python benchmarks/fidelity/run.py --model unet --take out/unet_*.json
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
from asyncdiff.tools.fidelity import fidelity, learned_metrics
from fidelity.grid import methods
from fidelity.ours import plain_work
from fidelity.plots import scatter, sheet
from fidelity.rivals import beaten
from fidelity.rows import Run, read, run_of, together
from fidelity.subjects import MODELS, Subject, subject

OUT = Path(os.environ.get("OUT", results_file.ROOT / "benchmarks" / "results"))
#: On how many other prompts waves are calibrated, half of them to judge by.
CALIBRATION, QUICK_CALIBRATION = 16, 8


def run_rows(
    args: argparse.Namespace,
    model: Subject,
    run: Run,
    rows: list[dict[str, Any]],
    save: Callable,
) -> None:
    """All rows of one run; ``save`` is called after each."""
    sampler, steps, guidance = run
    pipe = model.load(args.device, sampler)
    texts = model.prompts(args.prompts)
    others = model.other_prompts(QUICK_CALIBRATION if args.quick else CALIBRATION, texts)
    learned, missing = learned_metrics()
    for why in missing.values():
        print(f"left out: {why}", flush=True)

    def call() -> dict[str, Any]:
        noise = [torch.Generator("cpu").manual_seed(args.seed + i) for i in range(len(texts))]
        return {"prompt": texts, "guidance_scale": guidance, "generator": noise}

    with torch.no_grad():
        out = pipe(**call(), num_inference_steps=steps, output_type="pt")
    reference = out.images.float().cpu()
    plain = plain_work(pipe, steps)
    shown = {"plain": reference}
    here = {r["method"]: r for r in rows if run_of(r) == run}
    for method in methods(args.device, pipe, steps, others, guidance > 1, args.quick):
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
            "guidance": guidance,
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
            f"{run}  {method.name:<44} {method.devices} devices  "
            f"{row['speedup']:5.2f}x  {row['psnr_db']:6.2f} dB  SSIM {row['ssim']:.4f}  "
            f"({seconds:.1f} s)",
            flush=True,
        )
    mine = [r for r in rows if run_of(r) == run]
    for line in beaten(mine):
        print(line)
    at = args.out.with_suffix("")
    name = f"{at.name}_{sampler}_{steps}_{guidance:g}"
    scatter(mine, at.with_name(f"{name}.png"))
    sheet(shown, texts, at.with_name(f"{name}_sheet.png"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="emoji", choices=MODELS)
    parser.add_argument("--weights", type=Path, help="of a yardstick, that are not shipped yet")
    parser.add_argument("--pipeline", help="a local diffusers folder, in place of --model")
    parser.add_argument("--prompts-file", type=Path, help="of --pipeline: one prompt a line")
    parser.add_argument("--dtype", default="float16", help="of --pipeline")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samplers", nargs="+", help="ddim, dpm, euler or flow; default: all")
    parser.add_argument("--steps", type=int, nargs="+", help="default: what a sampler usually has")
    parser.add_argument("--prompts", type=int, default=60, metavar="COUNT")
    parser.add_argument(
        "--guidance", type=float, nargs="+", help="default: the model's usual one; 1 is none"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="REGEX", help="rows whose names match")
    parser.add_argument("--quick", action="store_true", help="a few rows, eight prompts")
    parser.add_argument("--take", nargs="+", type=Path, metavar="FILE", help="only put together")
    parser.add_argument("--out", type=Path, help="default: fidelity_MODEL.json among the results")
    args = parser.parse_args()
    if args.quick:
        args.prompts = min(args.prompts, 8)
    model = subject(args)
    if unknown := set(args.samplers or ()) - set(model.steps):
        parser.error(f"{model.name} is drawn with {', '.join(model.steps)}, not {unknown}")
    if args.out is None:
        args.out = OUT / f"fidelity_{args.model}.json"
    if args.take:
        whole = together([read(path) for path in args.take])
        args.out.write_text(json.dumps(whole, indent=1) + "\n")
        return
    settings = {
        "model": model.name,
        "prompts": model.prompts(args.prompts),
        "seed": args.seed,
        "device": args.device,
    }
    rows: list[dict[str, Any]] = []
    if args.out.exists():
        old = read(args.out)["figures"]
        if old["settings"] == settings:
            rows = old["rows"]

    def save() -> None:
        results_file.write(args.out, {"settings": settings, "rows": rows})

    for sampler in args.samplers or model.steps:
        for steps in args.steps or [model.steps[sampler]]:
            for guidance in args.guidance or [model.guidance]:
                run_rows(args, model, Run(sampler, steps, guidance), rows, save)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
