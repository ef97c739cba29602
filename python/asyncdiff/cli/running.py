"""Running a pipeline with a progress bar, timing it, and saying what ran."""

from __future__ import annotations

import inspect
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.progress import Progress, TaskID

from ..errors import InputError
from ..launcher import several_processes
from ..progress import Tasks
from .console import remark
from .failures import asked_of
from .flags import as_flags, as_python, flags
from .option_values import read_devices
from .options import Setting, Waves
from .subject import Model, Picture


class Preparing:
    """Shows how far preparations are in whatever bar is open; see :mod:`asyncdiff.progress`."""

    def __init__(self) -> None:
        self._told: Tasks | None = None

    def within(self, bar: Progress) -> None:
        """Use this bar from now on."""
        self._told = Tasks(bar)

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._told is not None:
            self._told(what, done, total)


def running_modes(
    split_guidance: bool, exact_mode: str, compile: bool | None, compile_whole: bool
) -> dict[str, Any]:
    """Arguments of the library for how guidance and exact steps run, and whether and how is
    compiled. Raises InputError for what excludes each other."""
    if compile_whole and compile is False:
        raise InputError("--compile-whole compiles: leave --no-compile out")
    return {
        "guidance": "split" if split_guidance else "batched",
        "exact_mode": exact_mode,
        "compile": "whole" if compile_whole else compile,
    }


@dataclass(frozen=True)
class Spread:
    """How a command spreads a generation: its devices, those of this process alone where there are
    several, arguments of ``parallelize`` as they are told, and as they are passed."""

    devices: list[str]
    told: dict[str, Any]
    arguments: dict[str, Any]

    @classmethod
    def of(
        cls,
        devices: str | None,
        quality: str | None,
        setting: Setting,
        modes: Mapping[str, Any] | None = None,
    ) -> Spread:
        """By quality; by hand where that is None. ``modes``: further arguments. Under torchrun
        every process has ranks of its own."""
        modes = dict(modes or {})
        if several_processes():
            return cls._of_group(devices, quality, setting, modes)
        if quality is None:
            ranks = pick(devices, setting, 2 if modes.get("guidance") == "split" else 1)
            return cls(ranks, setting.told() | modes, setting.arguments() | modes)
        chosen = {"quality": quality, **{k: v for k, v in modes.items() if k in _BESIDE}}
        return cls(usable(devices), chosen, chosen)

    @classmethod
    def _of_group(
        cls, devices: str | None, quality: str | None, setting: Setting, modes: dict[str, Any]
    ) -> Spread:
        from ..runtime.devices import own_device

        asked = read_devices(devices, 1)
        own = asked or [str(own_device())]
        where = {"group": "env", "devices": asked}
        if quality is None:
            return cls(own, where | setting.told() | modes, where | setting.arguments() | modes)
        chosen = {"quality": quality, **{k: v for k, v in modes.items() if k in _BESIDE}}
        return cls(own, where | chosen, where | chosen)


#: Arguments that go with a quality.
_BESIDE = ("compile", "speeds", "memory", "compress")


def usable(text: str | None) -> list[str]:
    """Devices that a quality may use, from ``--devices`` or by default (all GPUs, else the CPU);
    two ranks share a device that is the only one, to show what two would draw.

    Raises DeviceError for devices that this machine does not have.
    """
    from ..runtime.devices import every_device, resolve

    asked = read_devices(text, 2)
    count = len(asked) if asked else max(2, len(every_device(None)))
    devices = [str(d) for d in resolve(asked, count)]
    _say_what_is_shared(devices)
    return devices


def pick(text: str | None, setting: Waves, groups: int = 1) -> list[str]:
    """One device a rank, from ``--devices`` or by default (all GPUs in turn, else the CPU).

    Says so where ranks share a device: that is correct and not faster, and nobody should be left
    to wonder. Raises DeviceError for devices that do not fit the ranks or this machine.
    """
    from ..runtime.devices import resolve

    ranks = groups * setting.ranks
    published = setting.how()[0] == "asyncdiff"
    why = "--components + --stride - 1" if published else "--components"
    if groups > 1:
        why = f"{groups} x ({why}), with --split-guidance,"
    devices = [str(d) for d in resolve(read_devices(text, ranks), ranks, why)]
    _say_what_is_shared(devices)
    return devices


def _say_what_is_shared(devices: list[str]) -> None:
    if shared(devices):
        where = "the CPU" if set(devices) == {"cpu"} else ", ".join(sorted(set(devices)))
        ranks = len(devices)
        remark(
            f"{ranks} ranks share {where}: the pictures are those of {ranks} devices, "
            "the times are not"
        )


def shared(devices: list[str]) -> bool:
    """Whether ranks share a device, so that times tell nothing about several."""
    return len(set(devices)) < len(devices)


def picture(pipe: Any, bar: Progress, task: TaskID, **call: Any) -> tuple[Any, float]:
    """One generation: its first image (of a video the first frame) and its milliseconds.

    The task advances by one a step where the pipeline reports steps, else at the end. Raises
    InputError for what the pipeline refuses.
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
    with asked_of(type(pipe).__name__):
        output = pipe(**call)  # images leave the device, so the device is done when this returns
    ms = (time.perf_counter() - start) * 1e3
    bar.advance(task, max(0, steps - seen))
    return _first(output), ms


def check_call(pipe: Any, call: Mapping[str, Any]) -> None:
    """Raise InputError for arguments that the pipeline's call does not have."""
    accepted = inspect.signature(pipe.__call__).parameters
    if any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        return
    unknown = [flags().get(name, name) for name in call if name not in accepted]
    if unknown:
        raise InputError(f"{type(pipe).__name__} takes no {', '.join(unknown)}: leave it out")


def _first(output: Any) -> Any:
    if hasattr(output, "images"):
        return output.images[0]
    return output.frames[0][0]


def noise(seed: int) -> Any:
    """A generator on the CPU, so that every device starts from the same noise."""
    import torch

    return torch.Generator("cpu").manual_seed(seed)


def what_ran(
    subject: Model,
    drawn: Picture,
    pipe: Any,
    setting: Waves,
    arguments: Mapping[str, Any],
    devices: list[str],
    call: Mapping[str, Any],
    seed: int,
) -> dict[str, Any]:
    """What a report, or a picture's metadata, says of a generation: model, sampler, size, dtype and
    every setting, also as Python and as flags that would run the same.

    ``arguments`` are those of ``parallelize``; ``call`` the pipeline's.
    """
    from importlib import metadata

    from ..integrations.diffusers.denoisers import find_denoiser

    denoiser = find_denoiser(pipe)
    defaults = inspect.signature(pipe.__call__).parameters
    guidance = call.get("guidance_scale")
    if guidance is None and "guidance_scale" in defaults:
        guidance = defaults["guidance_scale"].default
    settings = {"devices": devices, **arguments}
    asked = {
        "num_inference_steps": setting.steps,
        "sampler": drawn.sampler,
        "dtype": subject.dtype,
        **call,
        "seed": seed,
    }
    which = shlex.join([subject.model or "--demo", *(f"--load={x}" for x in subject.load or [])])
    return {
        "model": subject.name,
        "pipeline": type(pipe).__name__,
        "denoiser": type(denoiser).__name__,
        "dtype": str(next(denoiser.parameters()).dtype).removeprefix("torch."),
        "sampler": type(pipe.scheduler).__name__,
        "steps": setting.steps,
        "guidance_scale": guidance,
        "seed": seed,
        **settings,
        "python": as_python(settings),
        "flags": f"{which} {as_flags({**settings, **asked})}",
        "versions": {name: metadata.version(name) for name in ("torch", "diffusers")},
    }
