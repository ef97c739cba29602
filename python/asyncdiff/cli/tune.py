"""``asyncdiff tune``: the fastest setting that keeps a wanted fidelity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import console, subject
from . import options as opt

DEMO_PROMPTS = 8


def tune(
    model: subject.Model = None,
    demo: subject.Demo = False,
    psnr: Annotated[float | None, typer.Option(help="Keep at least this mean PSNR, in dB.")] = None,
    lpips: Annotated[float | None, typer.Option(help="Keep at most this mean LPIPS.")] = None,
    prompt: subject.Prompts = None,
    prompts_file: subject.PromptsFile = None,
    steps: opt.Steps = 50,
    ranks: Annotated[
        int | None,
        typer.Option(help="Devices that the setting may use (default: those that are there)."),
    ] = None,
    devices: Annotated[
        str | None, typer.Option(help="Where to try, separated by commas; may repeat.")
    ] = None,
    calibrate_on: Annotated[
        Path | None,
        typer.Option(
            help="Other prompts, one a line: waves are calibrated on them.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The calibration, if what is taken has one.")
    ] = Path("out/calibration.json"),
    seed: opt.Seed = 0,
    dtype: subject.Dtype = None,
    as_json: opt.Json = False,
) -> None:
    """Find the fastest setting that keeps a wanted PSNR or LPIPS, by trying."""
    subject.check(model, demo, dtype)
    if (psnr is None) == (lpips is None):
        raise typer.BadParameter("give --psnr or --lpips, one of them")
    texts = subject.prompts(prompt, prompts_file, demo, DEMO_PROMPTS)
    others = subject.prompts(None, calibrate_on, False, 0) if calibrate_on is not None else None
    if others is not None:
        opt.writable(out)

    from ..runtime.devices import resolve
    from ..tools.tune import tune as search
    from .running import Preparing

    asked = opt.read_devices(devices, 1)
    where = [str(d) for d in resolve(asked, len(asked) if asked else 2)]
    pipe = subject.pipeline(model, where[0], dtype)
    told = Preparing()
    with console.progress() as bar:
        told.within(bar)
        found = search(
            pipe,
            texts,
            psnr_db=psnr,
            max_lpips=lpips,
            devices=where,
            ranks=ranks,
            num_inference_steps=steps,
            seed=seed,
            calibrate_on=others,
            progress=told,
        )
    calibration = found.chosen.calibration
    if calibration is not None:
        calibration.save(out)
    if as_json:
        where_to = {} if calibration is None else {"calibration": str(out.resolve())}
        console.emit_json(found.to_dict() | where_to)
        return
    stdout = console.stdout()
    for trial in found.tried:
        stdout.print(f"tried {trial}", markup=False)
    stdout.print(f"take  {found.chosen}", markup=False)
    if calibration is not None:
        stdout.print(f"calibration: {out.resolve()}", markup=False)
