"""``asyncdiff calibrate``: how waves predict clean images, fitted to a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import console, subject
from . import options as opt

DEMO_PROMPTS = 16


def calibrate(
    model: subject.Model = None,
    demo: subject.Demo = False,
    components: opt.Components = 2,
    stride: opt.Stride = 1,
    warmup: opt.Warmup = 1,
    exact_tail: opt.ExactTail = 0,
    delay: opt.Delay = None,
    steps: opt.Steps = 50,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    prompt: subject.Prompts = None,
    prompts_file: subject.PromptsFile = None,
    sampler: Annotated[str, typer.Option(help="Of --demo: ddim, dpm or euler.")] = "ddim",
    devices: opt.Devices = None,
    seed: opt.Seed = 0,
    dtype: subject.Dtype = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The file to write, for --order of generate.")
    ] = Path("out/calibration.json"),
    as_json: opt.Json = False,
) -> None:
    """Fit how waves predict clean images to a pipeline, its sampler, N, S, w and exact end."""
    from ..schedule.plan import check_delay, check_numbers, check_schedule
    from .demo import SAMPLERS

    subject.check(model, demo, dtype)
    check_schedule("wavefront", exact_tail=exact_tail)
    check_delay(delay, "wavefront", components)
    check_numbers(components, stride, warmup, steps, exact_tail)
    if sampler not in SAMPLERS:
        raise typer.BadParameter(f"--sampler is one of {', '.join(SAMPLERS)}, not {sampler}")
    texts = subject.prompts(prompt, prompts_file, demo, DEMO_PROMPTS)
    opt.writable(out)
    from .. import parallelize
    from .devices import pick
    from .running import Preparing, noise

    ranks = pick(devices, components, 1)
    pipe = subject.pipeline(model, ranks[0], dtype, sampler)
    call: dict[str, Any] = {"prompt": texts, "num_inference_steps": steps, "generator": noise(seed)}
    if guidance is not None:
        call["guidance_scale"] = guidance
    told = Preparing()
    handle = parallelize(
        pipe, devices=ranks, components=components, stride=stride, warmup=warmup,
        exact_tail=exact_tail, schedule="wavefront", delay=delay, compile=False, progress=told,
    )  # fmt: skip
    try:
        with console.progress() as bar:
            told.within(bar)
            found = handle.calibrate(**call)
    finally:
        handle.restore()
    found.save(out)
    if as_json:
        console.emit_json({"tried": dict(found.tried), "calibration": str(out.resolve())})
        return
    stdout = console.stdout()
    best = min(found.tried, key=lambda k: found.tried[k])
    for name, distance in found.tried.items():
        mark = "taken" if name == best else "tried"
        stdout.print(f"{mark}  {name}: {distance:.4f} from the sequential latents", markup=False)
    stdout.print(f"calibration: {out.resolve()}", markup=False)
