"""``asyncdiff tune``: the fastest setting that keeps a wanted fidelity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import console
from . import options as opt

DEMO_PROMPTS = 8


def tune(
    model: Annotated[
        str | None, typer.Argument(help="A diffusers folder, or an id of the hub.")
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Tune the shipped model.")] = False,
    psnr: Annotated[float | None, typer.Option(help="Keep at least this mean PSNR, in dB.")] = None,
    lpips: Annotated[float | None, typer.Option(help="Keep at most this mean LPIPS.")] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="What to draw; may be given several times."),
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="Prompts, one a line.", exists=True, dir_okay=False)
    ] = None,
    steps: opt.Steps = 50,
    ranks: Annotated[
        int | None,
        typer.Option(help="Devices that the setting may use (default: those that are there)."),
    ] = None,
    devices: Annotated[
        str | None, typer.Option(help="Where to try, separated by commas; may repeat.")
    ] = None,
    seed: opt.Seed = 0,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16 (default: float16 on GPUs).")
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Find the fastest setting that keeps a wanted PSNR or LPIPS, by trying."""
    from .generate import DTYPES, load, place

    if (model is None) == (not demo):
        raise typer.BadParameter("give a model or --demo, one of them")
    if (psnr is None) == (lpips is None):
        raise typer.BadParameter("give --psnr or --lpips, one of them")
    if dtype is not None and dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype is one of {', '.join(DTYPES)}, not {dtype}")
    texts = list(prompt or [])
    if prompts_file is not None:
        texts += [line for line in prompts_file.read_text().splitlines() if line.strip()]

    from .. import demo_model
    from ..devices import resolve
    from ..tune import tune as search
    from .demo import spread
    from .running import Preparing, quiet

    asked = opt.read_devices(devices, 1)
    where = [str(d) for d in resolve(asked, len(asked) if asked else 2)]
    if demo:
        texts = texts or spread(list(demo_model.known_prompts()), DEMO_PROMPTS)
        pipe: Any = demo_model.load(where[0])
    else:
        assert model is not None
        pipe = load(model, dtype or ("float32" if where[0] == "cpu" else "float16"))
        place(pipe, where[0])
    if not texts:
        raise typer.BadParameter("give prompts with --prompt or --prompts-file")
    quiet(pipe)
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
