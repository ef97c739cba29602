"""``asyncdiff demo``: the shipped model, sequentially and asynchronously, on one sheet."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from . import console
from . import options as opt

SAMPLERS = ("ddim", "dpm", "euler")
PICTURES = 6  # prompts that are drawn when none is asked for


def demo(
    components: opt.Components = 2,
    stride: opt.Stride = 1,
    warmup: opt.WarmupOrAuto = "1",
    steps: opt.Steps = 50,
    devices: opt.Devices = None,
    seed: opt.Seed = 0,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="What to draw; may be given several times."),
    ] = None,
    sampler: Annotated[str, typer.Option("--sampler", help="ddim, dpm or euler.")] = "ddim",
    time_shift: opt.TimeShift = False,
    schedule: opt.Schedule = "asyncdiff",
    exact_tail: opt.ExactTail = 0,
    delay: opt.Delay = None,
    order: opt.Order = None,
    out: opt.Out = Path("out/demo.png"),
    as_json: opt.Json = False,
) -> None:
    """Draw with the shipped model: one device and asynchronously, side by side."""
    from ..schedule.plan import check_delay, check_numbers, check_schedule

    exact, predictor = opt.read_warmup(warmup), opt.read_order(order)
    check_schedule(schedule, time_shift=time_shift, exact_tail=exact_tail)
    check_delay(delay, schedule, components)
    check_numbers(components, stride, exact if isinstance(exact, int) else 1, steps, exact_tail)
    if sampler not in SAMPLERS:
        raise typer.BadParameter(f"--sampler is one of {', '.join(SAMPLERS)}, not {sampler}")
    opt.writable(out)
    result = _run(
        components, stride, exact, steps, devices, seed, prompt, sampler, time_shift, schedule,
        exact_tail, delay, predictor, out,
    )  # fmt: skip
    if as_json:
        console.emit_json(result)
    else:
        _print(result)


def _run(
    components: int,
    stride: int,
    warmup: int | str,
    steps: int,
    devices: str | None,
    seed: int,
    prompts: list[str] | None,
    sampler: str,
    time_shift: bool,
    schedule: str,
    exact_tail: int,
    delay: int | None,
    order: Any,
    out: Path,
) -> dict[str, Any]:
    import torch

    from .. import parallelize
    from ..demo import model as demo_model
    from ..tools import compare
    from .devices import pick
    from .running import noise, picture, quiet

    ranks = pick(devices, components, 1 if schedule == "wavefront" else stride)
    prompts = prompts or spread(list(demo_model.known_prompts()), PICTURES)
    pipe = demo_model.load(ranks[0], torch.float32, scheduler=sampler)
    quiet(pipe)

    def draw(name: str) -> tuple[list[Any], list[float]]:
        images, times = [], []
        with console.progress() as bar:
            # The first generation also prepares (export, graphs, allocator): it is not timed.
            task = bar.add_task(name, total=steps * (len(prompts) + 1))
            for i, text in enumerate([prompts[0], *prompts]):
                image, ms = picture(
                    pipe, bar, task, prompt=text, num_inference_steps=steps,
                    generator=noise(seed + max(0, i - 1)),
                )  # fmt: skip
                if i:
                    images.append(image)
                    times.append(ms)
        return images, times

    plain, plain_ms = draw("sequential")
    handle = parallelize(
        pipe, devices=ranks, components=components, stride=stride, warmup=warmup,
        time_shift=time_shift, schedule=schedule, exact_tail=exact_tail, delay=delay, order=order,
    )  # fmt: skip
    try:
        fast, fast_ms = draw("asynchronous")
        report = handle.report().to_dict()
    finally:
        handle.restore()
    compare.sheet({"sequential": plain, "asynchronous": fast}, prompts, out)
    return {
        "components": components,
        "stride": stride,
        "warmup": warmup,
        "steps": steps,
        "schedule": schedule,
        "exact_tail": exact_tail,
        "sampler": sampler,
        "seed": seed,
        "devices": ranks,
        "results": [
            {
                "prompt": text,
                "sequential_ms": plain_ms[i],
                "asynchronous_ms": fast_ms[i],
                "psnr_db": compare.psnr(plain[i], fast[i]),
                "ssim": compare.ssim(plain[i], fast[i]),
            }
            for i, text in enumerate(prompts)
        ],
        "report": report,
        "picture": str(out.resolve()),
    }


def spread(names: list[str], count: int) -> list[str]:
    """``count`` of the names, evenly spread over the list (which is sorted by group)."""
    if len(names) <= count:
        return names
    return [names[i * len(names) // count] for i in range(count)]


def _print(result: dict[str, Any]) -> None:
    from rich.table import Table

    rows = result["results"]
    table = Table(
        "prompt", *(f"{n}, ms" for n in ("sequential", "asynchronous")), "PSNR, dB", "SSIM"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    keys = ("sequential_ms", "asynchronous_ms", "psnr_db", "ssim")
    mean = {key: fmean(r[key] for r in rows) for key in keys}
    for r in [*rows, {"prompt": "mean", **mean}]:
        table.add_row(r["prompt"], *(f"{r[k]:.{3 if k == 'ssim' else 1}f}" for k in keys))
    out = console.stdout()
    out.print(table)
    out.print(
        f"N={result['components']} S={result['stride']} w={result['warmup']} T={result['steps']} "
        f"on {', '.join(result['devices'])}: "
        f"{mean['sequential_ms'] / mean['asynchronous_ms']:.2f} times the speed"
    )
    out.print(f"picture: {result['picture']}", markup=False)
