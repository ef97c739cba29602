"""``asyncdiff bench exchange``: how fast bundles cross, beside other ways to move them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import console, files
from .. import options as opt
from ..option_values import read_devices

if TYPE_CHECKING:
    from asyncdiff_bench.machine import Machine

bench = typer.Typer(name="bench", help="Measure what asyncdiff is made of.", no_args_is_help=True)


@bench.callback()
def _group() -> None:
    """Keeps ``exchange`` a command of its own, while it is the only one."""


@bench.command()
def exchange(
    cases: Annotated[
        str | None, typer.Option(help="What to measure, as latency,enqueue (see --list).")
    ] = None,
    ways: Annotated[
        str | None, typer.Option(help="Ways to move a bundle, as auto,nccl (see --list).")
    ] = None,
    sizes: Annotated[str | None, typer.Option(help="Bytes of a bundle, as 16K,1M,256M.")] = None,
    bundles: Annotated[
        str | None, typer.Option(help="Bundles of many tensors, as sd21-N2,18x256K.")
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(help="One device a rank, as cuda:0,cuda:1. Left out: all GPUs, else the CPU."),
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of each figure (11; quick 5).")] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            help="When to begin nothing more, for the ways in one process and for those in "
            "several (55 each; quick 10)."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and rounds.")] = False,
    list_only: Annotated[
        bool, typer.Option("--list", help="List cases and ways, and what cannot run here.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="JSON with figures, hardware, versions.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Plot latency and bandwidth by size.")] = None,
    as_json: opt.Json = False,
) -> None:
    """Measure the exchange of bundles between two or more ranks; docs/metrics.md says how.

    Exit code 1: something that should have worked failed (the table says what).
    """
    from asyncdiff_bench import cases as all_cases
    from asyncdiff_bench import results as results_file
    from asyncdiff_bench import ways as all_ways
    from asyncdiff_bench.runner import run
    from asyncdiff_bench.settings import Settings

    machine = _machine(devices)
    chosen, by = all_cases.find(cases), all_ways.find(ways)
    settings = Settings.choose(
        machine,
        sizes=sizes,
        bundles=bundles,
        rounds=rounds,
        seconds=seconds,
        quick=quick,
    )
    if list_only:
        _list(machine)
        return
    if out is not None:
        files.check_writable(out)
    if png is not None:
        files.check_picture(png, [".png"])
        from asyncdiff_bench.plot import check, draw

        check(case.key for case in chosen)
    results = run(settings, chosen, by, console.remark)
    if out is not None:
        results_file.write(out, results.to_dict())
    if png is not None and results.figures:
        draw(results, png)
    if as_json:
        document = {"environment": results_file.environment(), "figures": results.to_dict()}
        console.emit_json(document)
    else:
        from asyncdiff_bench.table import render

        console.stdout().print(render(results))
        for path in (out, png):
            if path is not None:
                console.stdout().print(f"written to {path.resolve()}", markup=False)
    if results.failed:
        raise typer.Exit(1)


def _machine(text: str | None) -> Machine:
    """Ranks on the devices asked for; all GPUs, else the CPU. Raises DeviceError, BenchError."""
    from asyncdiff_bench.machine import Machine

    from ...runtime.devices import resolve

    asked = read_devices(text, 1)
    if asked is None:
        import torch

        asked = [str(d) for d in resolve(None, max(1, torch.cuda.device_count()))]
    return Machine.of([str(d) for d in resolve(asked, len(asked))])


def _list(machine: Machine) -> None:
    from rich.table import Table

    from asyncdiff_bench.cases import CASES
    from asyncdiff_bench.ways import known

    out = console.stdout()
    out.print(f"ranks on {', '.join(machine.devices)}", markup=False)
    table = Table("case", "what is measured")
    for case in CASES:
        table.add_row(case.key, case.description)
    out.print(table)
    table = Table("way", "what moves the data", "cannot run here", "")
    for way in known().values():
        reasons = {c.key: c.left_out(machine, way) for c in CASES}
        missing = way.missing(machine)
        some = [f"{key}: {why}" for key, why in reasons.items() if why and not missing]
        table.add_row(way.key, way.title, missing or "", "; ".join(some))
    out.print(table)
