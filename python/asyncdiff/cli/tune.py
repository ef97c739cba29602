"""``asyncdiff tune``: the fastest setting that keeps a wanted fidelity."""

from __future__ import annotations

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
    seed: opt.Seed = 0,
    dtype: subject.Dtype = None,
    as_json: opt.Json = False,
) -> None:
    """Find the fastest setting that keeps a wanted PSNR or LPIPS, by trying."""
    subject.check(model, demo, dtype)
    if (psnr is None) == (lpips is None):
        raise typer.BadParameter("give --psnr or --lpips, one of them")
    texts = subject.prompts(prompt, prompts_file, demo, DEMO_PROMPTS)

    from ..devices import resolve
    from ..tune import tune as search
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
            progress=told,
        )
    if as_json:
        console.emit_json(found.to_dict())
        return
    out = console.stdout()
    for trial in found.tried:
        out.print(f"tried {trial}", markup=False)
    out.print(f"take  {found.chosen}", markup=False)
