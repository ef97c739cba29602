"""The options that several commands share, and how their text is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import DeviceError, PlanError

Components = Annotated[
    int, typer.Option("--components", "-N", help="Parts that the denoiser is split into.")
]
Stride = Annotated[int, typer.Option("--stride", "-S", help="Sampler steps served by one tick.")]
Warmup = Annotated[int, typer.Option("--warmup", "-w", help="First steps, run exactly.")]
WarmupOrAuto = Annotated[
    str,
    typer.Option(
        "--warmup", "-w", help="First steps, run exactly; auto: while the output changes much."
    ),
]
Steps = Annotated[int, typer.Option("--steps", "-T", help="Sampler steps of a generation.")]
TimeShift = Annotated[
    bool, typer.Option("--time-shift", help="Pass the timestep one index earlier in every tick.")
]
Schedule = Annotated[
    str,
    typer.Option(
        "--schedule",
        help="asyncdiff (as published), or wavefront: closer to the sequential result.",
    ),
]
ExactTail = Annotated[int, typer.Option("--exact-tail", help="Last steps, run exactly.")]
Delay = Annotated[
    int | None,
    typer.Option(
        "--delay",
        help="Of wavefront: ticks until a prediction arrives, 1 to N - 1. Left out: what measured "
        "best.",
    ),
]
Order = Annotated[
    str | None,
    typer.Option(
        "--order",
        help="Of wavefront: how far clean images are extrapolated, 0 to 1, or a file written by "
        "asyncdiff calibrate.",
    ),
]
Devices = Annotated[
    str | None,
    typer.Option(
        "--devices",
        help="One device a rank (components + stride - 1; wavefront: components), separated by "
        "commas, for example cuda:0,cuda:1; may repeat. Left out: all visible GPUs, else the CPU.",
    ),
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Compile the components with inductor: a minute once, a third faster then. Left out: "
        "for large denoisers on GPUs.",
    ),
]
SplitGuidance = Annotated[
    bool,
    typer.Option(
        "--split-guidance", help="Twice the ranks: each half takes one condition of the guidance."
    ),
]
SplitWarmup = Annotated[
    bool,
    typer.Option(
        "--split-warmup",
        help="Exact steps but the last run whole on two devices, a condition each.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the starting noise.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The PNG to write.")]


def read_devices(text: str | None, ranks: int) -> list[str] | None:
    """``cuda:0,cuda:1`` as a list; one device alone is taken for every rank. None stays None.

    Raises DeviceError for an empty entry.
    """
    if text is None:
        return None
    devices = [d.strip() for d in text.split(",")]
    if not all(devices):
        raise DeviceError(f"--devices {text!r} has an empty entry: write cuda:0,cuda:1")
    return devices * ranks if len(devices) == 1 else devices


def read_warmup(text: str) -> int | str:
    """A number, or "auto". Raises PlanError for anything else."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError as error:
        raise PlanError(f"--warmup {text!r}: write a number of steps, or auto") from error


def read_order(text: str | None) -> Any:
    """A number, or the calibration in a file; None stays None. Raises PlanError for what is
    neither."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        pass
    from ..sampling.calibration import Calibration

    if not Path(text).is_file():
        raise PlanError(f"--order {text!r} is no number from 0 to 1, and there is no such file")
    return Calibration.load(text)


def writable(path: Path) -> Path:
    """Make the folder that ``path`` goes to, before long work. Raises typer.BadParameter."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"cannot write {path}: {error.strerror}") from error
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder: name a file")
    return path
