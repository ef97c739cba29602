"""``asyncdiff generate``: any diffusers pipeline, from a local folder or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ...launcher import speaks
from .. import console, files
from .. import options as opt
from ..option_groups import Given
from ..running import Preparing, Spread, check_call, noise, picture, running_modes, shared, what_ran
from ..subject import Model, Picture
from .demo import ENLARGED


def generate(
    given: Given,
    subject: Model,
    setting: opt.Setting,
    drawn: Picture,
    cards: opt.Cards,
    links: opt.Links,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to draw.")],
    negative: Annotated[str | None, typer.Option("--negative", help="What not to draw.")] = None,
    seed: opt.Seed = 0,
    quality: opt.Quality = None,
    devices: opt.Devices = None,
    compile: opt.Compile = None,
    compile_whole: opt.CompileWhole = False,
    split_guidance: opt.SplitGuidance = False,
    exact_mode: opt.ExactMode = "chain",
    with_compare: Annotated[
        bool, typer.Option("--compare", help="Also draw on one device, and compare.")
    ] = False,
    out: opt.Out = Path("out/generate.png"),
    as_json: opt.Json = False,
) -> None:
    """Draw one picture with a diffusers pipeline, asynchronously."""
    subject.check()
    setting.check()
    files.check_picture(out)
    subject.announce()
    from ... import parallelize
    from ...tools import compare
    from ...tools.prediction import predicted_speedup

    known = cards.arguments() | links.arguments()
    modes = running_modes(split_guidance, exact_mode, compile, compile_whole) | known
    spread = Spread.of(devices, opt.quality_of(quality, given), setting, modes)
    ranks = spread.devices
    pipe = subject.pipeline(ranks[0], drawn.sampler)
    call: dict[str, Any] = {"prompt": prompt, "num_inference_steps": setting.steps, **drawn.call()}
    if negative is not None:
        call["negative_prompt"] = negative
    check_call(pipe, call)
    preparing = Preparing()

    def draw(name: str) -> tuple[Any, float]:
        with console.progress() as bar:
            preparing.within(bar)
            task = bar.add_task(name, total=setting.steps)
            return picture(pipe, bar, task, generator=noise(seed), **call)

    told = what_ran(subject, drawn, pipe, setting, spread.told, ranks, call, seed)
    plain = None
    if with_compare:
        draw("preparing one device")  # the first generation on a device also prepares it
        plain, sequential_ms = draw("one device")
    arguments = {"devices": ranks} | spread.arguments
    handle = parallelize(pipe, progress=preparing, **arguments)
    try:
        fast, ms = draw("preparing all ranks" if with_compare else "asynchronous")
        prepare_s = handle.report().prepare_s
        ms -= 1e3 * prepare_s
        if with_compare:
            fast, ms = draw("asynchronous")
        report = handle.report()
        told["settings"] = handle.settings
        speedup = predicted_speedup(handle, setting.steps) if shared(ranks) else None
    finally:
        handle.restore()
    if not speaks():
        return
    image = compare.image(fast)
    result: dict[str, Any] = told | {
        "prompt": prompt, "negative_prompt": negative, "width": image.width, "height": image.height,
        "prepare_s": prepare_s, "asynchronous_ms": ms, "ranks_share_a_device": shared(ranks),
        "predicted_speedup": speedup,
        "report": report.to_dict(),
    }  # fmt: skip
    if plain is not None:
        result["sequential_ms"] = sequential_ms
        result["psnr_db"] = compare.psnr(plain, fast)
        result["ssim"] = compare.ssim(plain, fast)
        image = compare.side_by_side(
            [plain, fast, compare.difference(plain, fast, ENLARGED)],
            ["one device", f"asynchronous, {result['psnr_db']:.1f} dB", f"difference x {ENLARGED}"],
        )
    files.save_picture(image, out, result)
    result["picture"] = str(out.resolve())
    if as_json:
        console.emit_json(result)
    else:
        _print(result, str(report))


def _print(result: dict[str, Any], told: str) -> None:
    stdout = console.stdout()
    stdout.print(told, markup=False)
    if "ssim" in result:
        if not result["ranks_share_a_device"]:
            stdout.print(
                f"one device {result['sequential_ms']:.0f} ms, "
                f"asynchronous {result['asynchronous_ms']:.0f} ms"
            )
        stdout.print(
            f"beside one device's picture: PSNR {result['psnr_db']:.1f} dB, "
            f"SSIM {result['ssim']:.3f}"
        )
    console.print_ran(result)
    stdout.print(f"picture: {result['picture']}", markup=False)
