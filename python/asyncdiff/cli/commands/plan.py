"""``asyncdiff plan``: what would run where and when, and how long it would take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import PlanError
from .. import console, files
from .. import options as opt
from ..failures import asked_of
from ..fitting import what_fits
from ..option_groups import Given
from ..option_values import read_warmup
from ..subject import Model


def plan(
    subject: Model,
    setting: opt.Setting,
    cards: opt.Cards,
    links: opt.Links,
    given: Given,
    device: Annotated[
        str, typer.Option(help="Where the denoiser is measured: cpu, cuda:0, or meta (estimated).")
    ] = "cpu",
    height: Annotated[int | None, typer.Option(help="Pixels; the model's own if left out.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the model's own if left out.")] = None,
    component_ms: Annotated[
        str | None,
        typer.Option(help="Milliseconds of each component, as 6.8,7.1 (one number: all alike)."),
    ] = None,
    boundary: Annotated[
        list[str] | None,
        typer.Option(
            help="MiB from component i to j, as 0-1=58; with a tail that cannot overlap, "
            "0-1=58/2. May be repeated."
        ),
    ] = None,
    link_gb_per_s: Annotated[
        float, typer.Option(help="GB/s one way between two devices (left out: no time).")
    ] = math.inf,
    link_latency_us: Annotated[float, typer.Option(help="Microseconds a message.")] = 0.0,
    update_ms: Annotated[float, typer.Option(help="The sampler's update, ms a step.")] = 0.0,
    png: Annotated[Path | None, typer.Option(help="Draw the timeline to this file.")] = None,
    text: Annotated[bool, typer.Option("--text", help="Print every action of the plan.")] = False,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory",
            help="Say what of the model fits on which cards, by its configuration alone.",
        ),
    ] = False,
    cards_of: Annotated[
        str | None,
        typer.Option("--cards", help="Of --memory: the cards, as 24GB,12GB (default: all GPUs)."),
    ] = None,
    split_guidance: opt.SplitGuidance = False,
    as_json: opt.Json = False,
) -> None:
    """Print a plan; with a model its partition; with times the predicted latency; with --memory
    what fits on which cards."""
    if memory or cards_of is not None:
        if not memory:
            raise typer.BadParameter("--cards needs --memory")
        found = what_fits(
            subject, setting, given, cards, links, split_guidance, cards_of, height, width
        )
        if as_json:
            console.emit_json(found)
        else:
            from ...tools.fitting import tell

            console.stdout().print(tell(found), markup=False)
        return
    for flag, name in (("--compress", "compress"), ("--split-guidance", "split_guidance")):
        if name in given.names:
            raise typer.BadParameter(f"{flag} needs --memory: it is not in what else plan counts")
    from ...schedule import plan as plans
    from ...schedule import text as plan_text
    from ...schedule.plot import draw
    from ...schedule.simulate import Timing, predict, summary

    setting.check()
    with_model = subject.model is not None or subject.demo
    if with_model:
        subject.check()
    if png is not None:
        if component_ms is None and not with_model:
            raise typer.BadParameter("--png needs times: give --component-ms, a model or --demo")
        files.check_picture(png, [".png"])
    if boundary and component_ms is None:
        raise typer.BadParameter("--boundary needs --component-ms")
    components, stride, schedule = setting.components, setting.stride, setting.schedule
    warmup, steps = _warmup(setting), setting.steps
    numbers: dict[str, Any] = {
        "time_shift": setting.time_shift, "schedule": schedule,
        "exact_tail": setting.exact_tail, "delay": setting.delay,
    }  # fmt: skip
    built = plans.build(components, stride, warmup, steps, **numbers)
    timed = {
        "link_gb_per_s": link_gb_per_s, "link_latency_us": link_latency_us, "update_ms": update_ms
    }  # fmt: skip
    times = None if component_ms is None else read_times(component_ms, components)
    sizes, tails = read_boundaries(boundary or [])
    partition, told, timing = None, "", None
    if with_model:
        copies = plans.rank_count(components, stride, schedule) - components + 1
        tokens = schedule == "sequence"
        known = cards.arguments()
        report = _partition(subject, components, device, height, width, copies, tokens, known)
        partition, told = report.to_dict(), str(report)
        # Who sends to whom decides how late waves are.
        edges = [plans.Exchange(b.source, b.target) for b in report.boundaries]
        built = plans.build(components, stride, warmup, steps, exchanges=edges, **numbers)
        timing = Timing.from_report(partition, **timed)
    if times is not None:  # the user's own go before measured ones
        if timing is not None and not boundary:
            sizes, tails = dict(timing.boundary_bytes), dict(timing.tail_bytes)
        timing = Timing(times, sizes, tails, **timed)
    timeline = None if timing is None else predict(built, timing)
    if png is not None:
        assert timeline is not None
        draw(timeline, png)
    if as_json:
        console.emit_json(
            {
                "model": subject.name if with_model else None, "components": components,
                "stride": stride, "warmup": warmup, "steps": steps, **numbers,
                "ranks": built.ranks, "ticks": len(built.ticks),
                "plan": plan_text.to_text(built).splitlines(),
                "partition": partition,
                "prediction": None if timeline is None else timeline.to_dict(),
                "timeline": None if png is None else str(png.resolve()),
            }
        )  # fmt: skip
        return
    out = console.stdout()
    if told:
        out.print(told + "\n", markup=False)
    width = out.width if out.is_terminal else None
    out.print(plan_text.grid(built, width), markup=False)
    out.print(
        f"\n{built.ranks} ranks, {len(built.ticks)} ticks for {steps} steps; a cell is the "
        "timestep index, * delivers a noise prediction, x marks exact steps",
        markup=False,
    )
    if text:
        out.print("\n" + plan_text.to_text(built), markup=False)
    if timeline is not None:
        note = ""
        if schedule == "sequence":
            note = " (without the exchange of keys and values, which is in none of these times)"
        elif math.isinf(link_gb_per_s):
            note = " (links taken to be free: give --link-gb-per-s)"
        out.print(f"\npredicted{note}:\n{summary(timeline)}", markup=False)
    if png is not None:
        out.print(f"timeline: {png.resolve()}", markup=False)


def _warmup(setting: opt.Setting) -> int:
    warmup = read_warmup(setting.warmup)
    if isinstance(warmup, str):
        raise PlanError(
            "--warmup auto: how many steps that are shows in a run; plan needs a number"
        )
    return warmup


def _partition(
    subject: Model,
    components: int,
    device: str,
    height: int | None,
    width: int | None,
    copies: int,
    tokens: bool,
    cards: Mapping[str, Any],
) -> Any:
    subject.announce()
    from ...integrations.diffusers.pipeline import plan_partition

    usual = "float32" if device == "cpu" or subject.demo else "float16"
    pipe = replace(subject, dtype=subject.dtype or usual).pipeline("cpu")
    console.remark(f"capturing and measuring the denoiser on {device}")
    with asked_of(type(pipe).__name__):
        partition = plan_partition(
            pipe, components, device=device, height=height, width=width, copies=copies,
            tokens=tokens, **cards,
        )  # fmt: skip
    return partition.report()


def read_times(text: str, components: int) -> tuple[float, ...]:
    """``6.8,7.1`` as milliseconds; one number stands for every component. Raises PlanError."""
    try:
        times = tuple(float(t) for t in text.split(","))
    except ValueError as error:
        raise PlanError(f"--component-ms {text!r}: write numbers as 6.8,7.1") from error
    return times * components if len(times) == 1 else times


def read_boundaries(
    texts: list[str],
) -> tuple[dict[tuple[int, int], int], dict[tuple[int, int], int]]:
    """``0-1=58/2`` (MiB, of which the tail) as bytes by pair, and tail bytes. Raises PlanError."""
    sizes: dict[tuple[int, int], int] = {}
    tails: dict[tuple[int, int], int] = {}
    for text in texts:
        try:
            pair, _, amount = text.partition("=")
            source, target = map(int, pair.split("-"))
            size, _, tail = amount.partition("/")
            sizes[(source, target)] = int(float(size) * 2**20)
            tails[(source, target)] = int(float(tail or 0) * 2**20)
        except (ValueError, OverflowError) as error:
            raise PlanError(f"--boundary {text!r}: write 0-1=58, or 0-1=58/2 (MiB)") from error
    return sizes, tails
