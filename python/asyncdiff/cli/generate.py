"""``asyncdiff generate``: any diffusers pipeline, from a local folder or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from . import console
from . import options as opt

DTYPES = ("float32", "float16", "bfloat16")


def generate(
    model: Annotated[str, typer.Argument(help="A diffusers folder, or an id of the hub.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to draw.")],
    negative: Annotated[str | None, typer.Option("--negative", help="What not to draw.")] = None,
    components: opt.Components = 2,
    stride: opt.Stride = 1,
    warmup: opt.WarmupOrAuto = "1",
    steps: opt.Steps = 50,
    height: Annotated[int | None, typer.Option(help="Pixels; the model's own if left out.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the model's own if left out.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    seed: opt.Seed = 0,
    devices: opt.Devices = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16 (default: float16 on GPUs).")
    ] = None,
    time_shift: opt.TimeShift = False,
    schedule: opt.Schedule = "asyncdiff",
    exact_tail: opt.ExactTail = 0,
    delay: opt.Delay = None,
    order: opt.Order = None,
    compile: opt.Compile = None,
    split_guidance: opt.SplitGuidance = False,
    split_warmup: opt.SplitWarmup = False,
    with_compare: Annotated[
        bool, typer.Option("--compare", help="Also draw on one device, and compare.")
    ] = False,
    out: opt.Out = Path("out/generate.png"),
    as_json: opt.Json = False,
) -> None:
    """Draw one picture with a diffusers pipeline, asynchronously."""
    from ..schedule.plan import check_delay, check_numbers, check_schedule

    exact, predictor = opt.read_warmup(warmup), opt.read_order(order)
    check_schedule(schedule, time_shift=time_shift, exact_tail=exact_tail)
    check_delay(delay, schedule, components)
    check_numbers(components, stride, exact if isinstance(exact, int) else 1, steps, exact_tail)
    if dtype is not None and dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype is one of {', '.join(DTYPES)}, not {dtype}")
    opt.writable(out)
    from ..tools import compare
    from .devices import pick
    from .running import Preparing, noise, picture, quiet

    copies = 1 if schedule == "wavefront" else stride
    ranks = pick(devices, components, copies, 2 if split_guidance else 1)
    pipe = load(model, dtype or ("float32" if ranks[0] == "cpu" else "float16"))
    place(pipe, ranks[0])
    quiet(pipe)
    asked = {
        "height": height,
        "width": width,
        "guidance_scale": guidance,
        "negative_prompt": negative,
    }
    call: dict[str, Any] = {"prompt": prompt, "num_inference_steps": steps}
    call |= {k: v for k, v in asked.items() if v is not None}

    preparing = Preparing()

    def draw(name: str) -> tuple[Any, float]:
        with console.progress() as bar:
            preparing.within(bar)
            task = bar.add_task(name, total=steps)
            return picture(pipe, bar, task, generator=noise(seed), **call)

    result: dict[str, Any] = {"model": model, "prompt": prompt, "seed": seed, "devices": ranks}
    plain = None
    if with_compare:
        draw("preparing one device")  # the first generation on a device also prepares it
        plain, result["sequential_ms"] = draw("one device")
    from .. import parallelize

    handle = parallelize(
        pipe, devices=ranks, components=components, stride=stride, warmup=exact,
        time_shift=time_shift, schedule=schedule, exact_tail=exact_tail, delay=delay,
        order=predictor, guidance="split" if split_guidance else "batched",
        warmup_mode="split" if split_warmup else "chain", compile=compile, progress=preparing,
    )  # fmt: skip
    try:
        if with_compare:
            draw("preparing all ranks")
        fast, result["asynchronous_ms"] = draw("asynchronous")
        result["report"] = handle.report().to_dict()
        told = str(handle.report())
    finally:
        handle.restore()
    if plain is None:
        compare.image(fast).save(out, format="PNG")
    else:
        compare.side_by_side([plain, fast], ["one device", "asynchronous"], out)
        result["psnr_db"] = compare.psnr(plain, fast)
        result["ssim"] = compare.ssim(plain, fast)
    result["picture"] = str(out.resolve())
    if as_json:
        console.emit_json(result)
        return
    _print(result, told)


def _print(result: dict[str, Any], told: str) -> None:
    stdout = console.stdout()
    stdout.print(told, markup=False)
    if "ssim" in result:
        stdout.print(
            f"one device {result['sequential_ms']:.0f} ms, "
            f"asynchronous {result['asynchronous_ms']:.0f} ms, "
            f"PSNR {result['psnr_db']:.1f} dB, SSIM {result['ssim']:.3f}"
        )
    stdout.print(f"picture: {result['picture']}", markup=False)


def load(model: str, dtype: str) -> Any:
    """The pipeline, in host memory. Raises InputError where there is none of that name."""
    import torch
    from diffusers import DiffusionPipeline

    console.remark(f"loading {model}")
    try:
        return DiffusionPipeline.from_pretrained(model, torch_dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:  # no such folder or id, no network, not a pipeline
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot load {model!r} as a diffusers pipeline: {reason}") from error


def place(pipe: Any, device: str) -> None:
    """Move the pipeline. Raises InputError where the device does not exist here."""
    try:
        pipe.to(device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by how it was built
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot use {device}: {reason}") from error
