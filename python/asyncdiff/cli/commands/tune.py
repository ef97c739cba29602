"""``asyncdiff tune``: the fastest setting that keeps a wanted fidelity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import console, files
from .. import options as opt
from ..failures import asked_of
from ..flags import as_python
from ..option_values import read_devices
from ..running import Preparing, check_call, what_ran
from ..subject import Model, Picture, Prompts, PromptsFile
from ..subject import prompts as read_prompts

DEMO_PROMPTS = 8


def tune(
    subject: Model,
    drawn: Picture,
    psnr: Annotated[float | None, typer.Option(help="Keep at least this mean PSNR, in dB.")] = None,
    lpips: Annotated[float | None, typer.Option(help="Keep at most this mean LPIPS.")] = None,
    prompt: Prompts = None,
    prompts_file: PromptsFile = None,
    steps: Annotated[
        int, typer.Option("--steps", "-T", help="Sampler steps of a generation.")
    ] = 50,
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
    png: Annotated[
        Path | None, typer.Option(help="Draw speed against fidelity of all that was tried.")
    ] = None,
    seed: opt.Seed = 0,
    as_json: opt.Json = False,
) -> None:
    """Find the fastest setting that keeps a wanted PSNR or LPIPS, by trying."""
    subject.check()
    if (psnr is None) == (lpips is None):
        raise typer.BadParameter("give --psnr or --lpips, one of them")
    opt.Setting(steps=steps).check()
    texts = read_prompts(prompt, prompts_file, subject.demo, DEMO_PROMPTS)
    others = read_prompts(None, calibrate_on, False, 0) if calibrate_on is not None else None
    if others is not None:
        files.check_writable(out)
    if png is not None:
        files.check_picture(png, [".png"])
    subject.announce()

    from ...runtime.devices import resolve
    from ...tools.tune import check_request
    from ...tools.tune import tune as search

    asked = read_devices(devices, 1)
    where = [str(d) for d in resolve(asked, len(asked) if asked else 2)]
    wanted: dict[str, Any] = {"psnr_db": psnr, "max_lpips": lpips}
    request = wanted | {"devices": where, "ranks": ranks, "calibrate_on": others}
    check_request(texts, **request)
    pipe = subject.pipeline(where[0], drawn.sampler)
    check_call(pipe, drawn.call())
    preparing = Preparing()
    with console.progress() as bar, asked_of(type(pipe).__name__):
        preparing.within(bar)
        found = search(
            pipe,
            texts,
            **request,
            num_inference_steps=steps,
            seed=seed,
            call=drawn.call(),
            progress=preparing,
        )
    chosen = found.chosen
    arguments = dict(chosen.arguments)
    if chosen.calibration is not None:
        chosen.calibration.save(out)
        arguments["order"] = str(out)
    setting = opt.Setting(steps=steps)
    told = what_ran(subject, drawn, pipe, setting, arguments, where, drawn.call(), seed)
    # Where it was tried is not where it will run.
    told["python"] = as_python(arguments)
    told["flags"] = told["flags"].replace(f"--devices {','.join(where)} ", "", 1)
    if png is not None:
        from ...tools.tune_plot import draw

        draw(found, png, psnr_db=psnr, max_lpips=lpips)
    if as_json:
        where_to = {} if chosen.calibration is None else {"calibration": str(out.resolve())}
        console.emit_json(told | found.to_dict() | where_to | {"prompts": texts})
        return
    stdout = console.stdout()
    for trial in found.tried:
        stdout.print(f"tried {trial}", markup=False)
    stdout.print(f"take  {chosen}", markup=False)
    console.print_ran(told)
    if chosen.calibration is not None:
        stdout.print(f"calibration: {out.resolve()}", markup=False)
    if png is not None:
        stdout.print(f"plot: {png.resolve()}", markup=False)
