"""``asyncdiff demo``: the shipped model, plainly and asynchronously, on one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from .. import console, files
from .. import options as opt
from ..running import Preparing, noise, pick, picture, shared, what_ran
from ..subject import Model, Picture, Prompts, chosen

PICTURES = 6  # prompts that are drawn when none is asked for
#: What a schedule is called on the sheet.
NAMES = {"asyncdiff": "as published", "wavefront": "waves"}
#: By how much differences are enlarged, so that they can be seen.
ENLARGED = 4


@dataclass(frozen=True)
class Demo(opt.Setting):
    """A setting whose schedule is both of them, unless one is asked for."""

    schedule: Annotated[str, typer.Option("--schedule", help="asyncdiff, wavefront, or both.")] = (
        "both"
    )

    def settings(self) -> list[opt.Setting]:
        """One for each schedule that is to be drawn."""
        values = dict(vars(self))
        if self.schedule != "both":
            return [opt.Setting(**values)]
        published = opt.Setting(**values | {"schedule": "asyncdiff", "order": None, "delay": None})
        waves = opt.Setting(**values | {"schedule": "wavefront", "time_shift": False})
        return [published, waves] if self.components > 1 else [published]


def demo(
    setting: Demo,
    drawn: Picture,
    prompt: Prompts = None,
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
    settings = setting.settings()
    for one in settings:
        one.check()
    files.check_picture(out)
    result = _run(settings, drawn, prompt, devices, seed, out)
    if as_json:
        console.emit_json(result)
    else:
        _print(result)


def _run(
    settings: Sequence[opt.Setting],
    drawn: Picture,
    prompts: list[str] | None,
    devices: str | None,
    seed: int,
    out: Path,
) -> dict[str, Any]:
    subject = Model(demo=True)
    subject.announce()
    from ...demo import model as demo_model
    from ...tools import compare

    ranks = pick(devices, max(settings, key=lambda one: one.ranks))
    prompts = prompts or chosen(list(demo_model.known_prompts()), PICTURES)
    pipe = subject.pipeline(ranks[0], drawn.sampler or "ddim")
    steps = settings[0].steps
    call = {"num_inference_steps": steps, **drawn.call()}
    preparing = Preparing()

    def draw(name: str) -> tuple[list[Any], list[float]]:
        images, times = [], []
        with console.progress() as bar:
            preparing.within(bar)
            # The first generation also prepares (export, graphs, allocator): it is not timed.
            task = bar.add_task(name, total=steps * (len(prompts) + 1))
            for i, text in enumerate([prompts[0], *prompts]):
                image, ms = picture(
                    pipe, bar, task, prompt=text, generator=noise(seed + max(0, i - 1)), **call
                )
                if i:
                    images.append(image)
                    times.append(ms)
        return images, times

    plain, plain_ms = draw("one device")
    runs = []
    rows: dict[str, list[Any]] = {"one device": plain}
    notes: dict[str, list[str]] = {}
    for one in settings:
        mine = ranks[: one.ranks]
        told = what_ran(subject, drawn, pipe, one, one.told(), mine, call, seed)
        told |= {"width": plain[0].width, "height": plain[0].height}
        images, run = _asynchronous(pipe, one, mine, draw, preparing)
        results = [
            {
                "prompt": text,
                "sequential_ms": plain_ms[i],
                "asynchronous_ms": run["times"][i],
                "psnr_db": compare.psnr(plain[i], images[i]),
                "ssim": compare.ssim(plain[i], images[i]),
            }
            for i, text in enumerate(prompts)
        ]
        name = NAMES[one.schedule]
        rows[name] = images
        notes[name] = [f"{r['psnr_db']:.1f} dB" for r in results]
        rows[f"{name}:\ndifference x {ENLARGED}"] = [
            compare.difference(a, b, ENLARGED) for a, b in zip(plain, images, strict=True)
        ]
        del run["times"]
        runs.append(told | run | {"results": results})
    sheet = compare.sheet(rows, prompts, notes=notes)
    files.save_picture(sheet, out, {"runs": runs})
    return {"runs": runs, "picture": str(out.resolve())}


def _asynchronous(
    pipe: Any, setting: opt.Setting, ranks: list[str], draw: Any, preparing: Preparing
) -> tuple[list[Any], dict[str, Any]]:
    """The pictures, and what is told of the run."""
    from ... import parallelize
    from ...tools.prediction import predicted

    handle = parallelize(pipe, devices=ranks, progress=preparing, **setting.arguments())
    try:
        images, times = draw(NAMES[setting.schedule])
        timeline = predicted(handle, setting.steps) if shared(ranks) else None
        return images, {
            "times": times,
            "ranks_share_a_device": shared(ranks),
            "predicted_speedup": None if timeline is None else timeline.speedup,
            "report": handle.report().to_dict(),
        }
    finally:
        handle.restore()


def _print(result: dict[str, Any]) -> None:
    from rich.table import Table

    out = console.stdout()
    for run in result["runs"]:
        rows = run["results"]
        timed = not run["ranks_share_a_device"]
        keys = ["psnr_db", "ssim"]
        heads = ["PSNR, dB", "SSIM"]
        if timed:
            keys = ["sequential_ms", "asynchronous_ms", *keys]
            heads = ["one device, ms", "asynchronous, ms", *heads]
        table = Table("prompt", *heads, title=NAMES[run["schedule"]], title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        mean = {key: fmean(r[key] for r in rows) for key in keys}
        for r in [*rows, {"prompt": "mean", **mean}]:
            table.add_row(r["prompt"], *(f"{r[k]:.{3 if k == 'ssim' else 1}f}" for k in keys))
        out.print(table)
        if timed:
            ratio = mean["sequential_ms"] / mean["asynchronous_ms"]
            out.print(f"{ratio:.2f} times the speed on {', '.join(run['devices'])}")
        console.print_ran(run)
        out.print()
    out.print(f"picture: {result['picture']}", markup=False)
