"""``asyncdiff demo``: the shipped model, plainly and asynchronously, on one sheet."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from .. import console, files
from .. import options as opt
from ..option_groups import Given
from ..running import Preparing, Spread, noise, picture, shared, what_ran
from ..subject import Model, Picture, Prompts, chosen

PICTURES = 6  # prompts that are drawn when none is asked for
#: By how much differences are enlarged, so that they can be seen.
ENLARGED = 4
#: What the asynchronous pictures are called on the sheet, where settings are given by hand.
NAMES = {"asyncdiff": "as published", "wavefront": "waves", "pipeline": "in turn"}


def demo(
    given: Given,
    setting: opt.Setting,
    drawn: Picture,
    prompt: Prompts = None,
    quality: opt.Quality = None,
    devices: opt.Devices = None,
    seed: opt.Seed = 0,
    out: opt.Out = Path("out/demo.png"),
    list_only: Annotated[
        bool, typer.Option("--list", help="List the prompts that it draws well.")
    ] = False,
    as_json: opt.Json = False,
) -> None:
    """Draw with the shipped model: one device and asynchronously, one above the other."""
    if list_only:
        from ...demo import known_prompts

        known = known_prompts()
        if as_json:
            console.emit_json(known)
        else:
            console.stdout().print("\n".join(known), markup=False)
        return
    setting.check()
    files.check_picture(out)
    subject = Model(demo=True)
    subject.announce()
    spread = Spread.of(devices, opt.quality_of(quality, given), setting)
    result = _run(subject, spread, setting, drawn, prompt, seed, out)
    if as_json:
        console.emit_json(result)
    else:
        _print(result)


def _run(
    subject: Model,
    spread: Spread,
    setting: opt.Setting,
    drawn: Picture,
    prompts: list[str] | None,
    seed: int,
    out: Path,
) -> dict[str, Any]:
    from ... import parallelize
    from ...demo import model as demo_model
    from ...tools import compare
    from ...tools.prediction import predicted_speedup

    prompts = prompts or chosen(list(demo_model.known_prompts()), PICTURES)
    pipe = subject.pipeline(spread.devices[0], drawn.sampler or "ddim")
    call = {"num_inference_steps": setting.steps, **drawn.call()}
    preparing = Preparing()

    def draw(name: str) -> tuple[list[Any], list[float]]:
        images, times = [], []
        with console.progress() as bar:
            preparing.within(bar)
            # The first generation also prepares (export, graphs, allocator): it is not timed.
            task = bar.add_task(name, total=setting.steps * (len(prompts) + 1))
            for i, text in enumerate([prompts[0], *prompts]):
                image, ms = picture(
                    pipe, bar, task, prompt=text, generator=noise(seed + max(0, i - 1)), **call
                )
                if i:
                    images.append(image)
                    times.append(ms)
        return images, times

    plain, plain_ms = draw("one device")
    told = what_ran(subject, drawn, pipe, setting, spread.told, spread.devices, call, seed)
    told |= {"width": plain[0].width, "height": plain[0].height}
    handle = parallelize(pipe, devices=spread.devices, progress=preparing, **spread.arguments)
    try:
        images, ms = draw("asynchronous")
        speedup = predicted_speedup(handle, setting.steps) if shared(spread.devices) else None
        told |= {
            "settings": handle.settings,
            "ranks_share_a_device": shared(spread.devices),
            "predicted_speedup": speedup,
            "report": handle.report().to_dict(),
        }
    finally:
        handle.restore()
    results = [
        {
            "prompt": text,
            "sequential_ms": plain_ms[i],
            "asynchronous_ms": ms[i],
            "psnr_db": compare.psnr(plain[i], images[i]),
            "ssim": compare.ssim(plain[i], images[i]),
        }
        for i, text in enumerate(prompts)
    ]
    how = f"quality {told['quality']}" if "quality" in told else NAMES[told["schedule"]]
    name = f"{len(spread.devices)} devices,\n{how}"
    rows = {
        "one device": plain,
        name: images,
        f"difference x {ENLARGED}": [
            compare.difference(a, b, ENLARGED) for a, b in zip(plain, images, strict=True)
        ],
    }
    notes = {name: [f"{r['psnr_db']:.1f} dB" for r in results]}
    result = told | {"results": results}
    files.save_picture(compare.sheet(rows, prompts, notes=notes), out, result)
    return result | {"picture": str(out.resolve())}


def _print(result: dict[str, Any]) -> None:
    from rich.table import Table

    out = console.stdout()
    rows = result["results"]
    timed = not result["ranks_share_a_device"]
    keys = ["psnr_db", "ssim"]
    heads = ["PSNR, dB", "SSIM"]
    if timed:
        keys = ["sequential_ms", "asynchronous_ms", *keys]
        heads = ["one device, ms", "asynchronous, ms", *heads]
    table = Table("prompt", *heads)
    for column in table.columns[1:]:
        column.justify = "right"
    mean = {key: fmean(r[key] for r in rows) for key in keys}
    for r in [*rows, {"prompt": "mean", **mean}]:
        table.add_row(r["prompt"], *(f"{r[k]:.{3 if k == 'ssim' else 1}f}" for k in keys))
    out.print(table)
    if timed:
        ratio = mean["sequential_ms"] / mean["asynchronous_ms"]
        out.print(f"{ratio:.2f} times the speed on {', '.join(result['devices'])}")
    console.print_ran(result)
    out.print(f"picture: {result['picture']}", markup=False)
