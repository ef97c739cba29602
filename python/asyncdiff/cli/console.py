"""What is printed where: results to stdout, everything about the way there to stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..launcher import speaks


def stdout() -> Console:
    """For results. Made anew: tests and callers may have replaced the stream."""
    return Console(soft_wrap=True, highlight=False)


def stderr() -> Console:
    """For progress and remarks."""
    return Console(stderr=True, highlight=False)


def remark(text: str) -> None:
    """One line on stderr, never mixed into results."""
    if not speaks():
        return
    stderr().print(text, style="dim", markup=False)


def emit_json(data: Any) -> None:
    """One JSON document on stdout. Infinite and undefined numbers become null, as JSON has none."""
    sys.stdout.write(json.dumps(_finite(data), indent=1) + "\n")


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {str(k): _finite(v) for k, v in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(v) for v in data]
    if data is None or isinstance(data, (str, int)):
        return data
    return str(data)


@contextmanager
def progress() -> Iterator[Progress]:
    """A bar on stderr that disappears when done; nothing at all where stderr is no terminal."""
    console = stderr()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not (console.is_terminal and speaks()),
    ) as bar:
        yield bar


def print_ran(told: Mapping[str, Any]) -> None:
    """What ran (:func:`asyncdiff.cli.running.what_ran`) in a few lines, and what is predicted where
    ranks shared a device."""
    out = stdout()
    if told.get("predicted_speedup"):
        out.print(
            f"predicted for {len(told['devices'])} devices like this one: the denoiser at "
            f"{told['predicted_speedup']:.2f} times the speed"
        )
    if told.get("quality"):
        out.print(f"quality {told['quality']} picked {told['settings']}", markup=False)
    size = f", {told['width']} x {told['height']}" if "width" in told else ""
    out.print(
        f"{told['model']}: {told['pipeline']}, {told['sampler']}, {told['steps']} steps, guidance "
        f"{told['guidance_scale']}, {told['dtype']}{size}, seed {told['seed']}",
        markup=False,
    )
    out.print(f"as Python: {told['python']}", markup=False)
    out.print(f"as flags:  {told['flags']}", markup=False)
