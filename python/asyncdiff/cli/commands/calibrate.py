"""``asyncdiff calibrate``: how waves predict clean images, fitted to a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import PlanError
from .. import console, files
from .. import options as opt
from ..failures import asked_of
from ..running import Preparing, check_call, noise, pick, what_ran
from ..subject import Model, Picture, Prompts, PromptsFile
from ..subject import prompts as read_prompts

DEMO_PROMPTS = 16


def calibrate(
    subject: Model,
    setting: opt.Waves,
    drawn: Picture,
    prompt: Prompts = None,
    prompts_file: PromptsFile = None,
    devices: opt.Devices = None,
    seed: opt.Seed = 0,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The file to write, for --order of generate.")
    ] = Path("out/calibration.json"),
    as_json: opt.Json = False,
) -> None:
    """Fit how waves predict clean images to a pipeline, its sampler, N, S, w and exact end."""
    subject.check()
    setting.check()
    if setting.warmup == "auto":
        raise PlanError("a calibration is for a fixed number of exact steps: set --warmup to it")
    texts = read_prompts(prompt, prompts_file, subject.demo, DEMO_PROMPTS)
    from ... import parallelize
    from ...sampling.fit import check_pictures

    check_pictures(texts)
    files.check_writable(out)
    subject.announce()

    ranks = pick(devices, setting)
    pipe = subject.pipeline(ranks[0], drawn.sampler or ("ddim" if subject.demo else None))
    call: dict[str, Any] = {"num_inference_steps": setting.steps, **drawn.call()}
    check_call(pipe, call)
    arguments = {**setting.told(), "order": str(out)}
    told = what_ran(subject, drawn, pipe, setting, arguments, ranks, call, seed)
    preparing = Preparing()
    handle = parallelize(
        pipe, devices=ranks, compile=False, progress=preparing, **setting.arguments()
    )
    try:
        with console.progress() as bar, asked_of(type(pipe).__name__):
            preparing.within(bar)
            preparing("preparing", 0, 1)
            found = handle.calibrate(prompt=texts, generator=noise(seed), **call)
    finally:
        handle.restore()
    found.save(out)
    if as_json:
        judged = {"taken": found.taken, "gains_db": list(found.gains), "prompts": texts}
        console.emit_json(told | judged | {"calibration": str(out.resolve())})
        return
    stdout = console.stdout()
    stdout.print(str(found), markup=False)
    console.print_ran(told)
    stdout.print(f"calibration: {out.resolve()}", markup=False)
