"""``asyncdiff prepare``: what preparing for pictures of some sizes finds out, kept on the disk."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from ...launcher import speaks
from .. import console
from .. import options as opt
from ..option_groups import Given
from ..running import Preparing, Spread, check_call, running_modes
from ..subject import Model, Picture


def prepare(
    given: Given,
    subject: Model,
    setting: opt.Setting,
    drawn: Picture,
    cards: opt.Cards,
    links: opt.Links,
    size: Annotated[
        list[str] | None,
        typer.Option(
            "--size", help="Width x height in pixels, as 1024x768; may be given several times."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Pictures of a call.")] = 1,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="A prompt, where its length matters.")
    ] = None,
    quality: opt.Quality = None,
    devices: opt.Devices = None,
    compile: opt.Compile = None,
    compile_whole: opt.CompileWhole = False,
    split_guidance: opt.SplitGuidance = False,
    exact_mode: opt.ExactMode = "chain",
    as_json: opt.Json = False,
) -> None:
    """Prepare a diffusers pipeline for some sizes, so that other processes find that done."""
    subject.check()
    setting.check()
    sizes = [read_size(text) for text in size or []]
    if sizes and (drawn.height is not None or drawn.width is not None):
        raise typer.BadParameter("--size says what --height and --width would: leave those out")
    subject.announce()
    from ... import parallelize
    from ...preparation.folder import preparations

    known = cards.arguments() | links.arguments()
    modes = running_modes(split_guidance, exact_mode, compile, compile_whole) | known
    spread = Spread.of(devices, opt.quality_of(quality, given), setting, modes)
    pipe = subject.pipeline(spread.devices[0], drawn.sampler)
    call = drawn.call()
    if prompt is not None:
        call["prompt"] = prompt
    check_call(pipe, call)
    if sizes:
        call |= {"width": [w for w, _ in sizes], "height": [h for _, h in sizes]}
    preparing = Preparing()
    arguments = {"devices": spread.devices} | spread.arguments
    with (
        console.progress() as bar,
        parallelize(pipe, progress=preparing, **arguments) as handle,
    ):
        preparing.within(bar)
        made = handle.prepare(batch=batch, steps=setting.steps, **call)
    if not speaks():
        return
    folder = preparations()
    kept = str(folder.path) if folder.usable() and folder.entries() else None
    if as_json:
        told = {"model": subject.name, "devices": spread.devices, "kept_in": kept}
        console.emit_json(told | {"prepared": [each.to_dict() for each in made]})
        return
    out = console.stdout()
    for each in made:
        out.print(str(each), markup=False)
    for settings in dict.fromkeys(each.settings for each in made):
        out.print(f"settings: {settings}", markup=False)
    out.print(f"kept in {kept}" if kept else "nothing is kept on the disk", markup=False)


def read_size(text: str) -> tuple[int, int]:
    """``1024x768`` as width and height. Raises typer.BadParameter."""
    found = re.fullmatch(r"([1-9]\d*)\s*[x×]\s*([1-9]\d*)", text.strip())
    if found is None:
        raise typer.BadParameter(f"--size {text!r}: write WIDTHxHEIGHT, as 1024x768")
    return int(found[1]), int(found[2])
