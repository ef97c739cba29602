"""Running a pipeline with a progress bar, and timing it."""

from __future__ import annotations

import inspect
import time
from typing import Any

from rich.progress import Progress, TaskID


def quiet(pipe: Any) -> None:
    """Stop diffusers' own bar: ours is on stderr and vanishes when done."""
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)


class Preparing:
    """Shows how far preparations are in whatever bar is open; see :mod:`asyncdiff.progress`."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def within(self, bar: Progress) -> None:
        """Use this bar from now on."""
        self._bar = bar
        self._tasks.clear()

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._bar is None:
            return
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total)
        self._bar.update(self._tasks[what], completed=done)


def picture(pipe: Any, bar: Progress, task: TaskID, **call: Any) -> tuple[Any, float]:
    """One generation: its first image (of a video the first frame) and its milliseconds.

    The task advances by one a step where the pipeline reports steps, else at the end.
    """
    steps = int(call.get("num_inference_steps", 1))
    seen = 0

    def stepped(_pipe: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        nonlocal seen
        seen += 1
        if seen <= steps:
            bar.advance(task)
        return values

    accepted = inspect.signature(pipe.__call__).parameters
    if "callback_on_step_end" in accepted:
        call["callback_on_step_end"] = stepped
    start = time.perf_counter()
    output = pipe(**call)  # images leave the device, so the device is done when this returns
    ms = (time.perf_counter() - start) * 1e3
    bar.advance(task, max(0, steps - seen))
    return _first(output), ms


def _first(output: Any) -> Any:
    if hasattr(output, "images"):
        return output.images[0]
    return output.frames[0][0]


def noise(seed: int) -> Any:
    """A generator on the CPU, so that every device starts from the same noise."""
    import torch

    return torch.Generator("cpu").manual_seed(seed)
