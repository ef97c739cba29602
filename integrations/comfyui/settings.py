"""The node's inputs as settings of asyncdiff."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

import torch

from asyncdiff import ParallelConfig
from asyncdiff.errors import DeviceError, InputError
from asyncdiff.quality import check_quality
from asyncdiff.runtime.devices import devices_of as devices_of_ranks
from asyncdiff.runtime.devices import every_device

log = logging.getLogger("asyncdiff")

_COMPILE = {"auto": None, "off": False, "on": True}
#: Conditions of guidance, each with devices of its own where they are split.
_CONDITIONS = 2


@dataclass(frozen=True)
class Settings:
    """What a MODEL of a node runs with: ``config``, or, with a ``quality``, what that picks for
    ``devices`` when a run begins, and of ``config`` only what it does not pick."""

    config: ParallelConfig
    quality: str | None = None
    devices: tuple[torch.device, ...] = ()


def by_quality(
    quality: str, devices: str = "", compile: str = "auto", compress: str = "off"
) -> Settings:
    """Settings that are picked when a run begins. Raises InputError for what is no quality, and for
    names that are no devices, DeviceError for devices that are not there, and where there is one
    only."""
    check_quality(quality)
    there = every_device(devices_of(devices))
    if len(there) < 2:
        raise DeviceError(_nothing_to_spread(there))
    config = ParallelConfig(
        devices=there[:1],
        components=1,
        compile=_COMPILE[compile],
        compress=None if compress == "off" else compress,
    )
    return Settings(config, quality, tuple(there))


def config_of(
    devices: str = "",
    components: int = 0,
    schedule: str = "wavefront",
    warmup: int = 6,
    exact_tail: int = 1,
    guidance: str = "batched",
    exact_mode: str = "chain",
    compile: str = "auto",
    compress: str = "off",
) -> ParallelConfig:
    """The configuration that the node's inputs mean. Raises InputError for names that are no
    devices, DeviceError where there are too few or too many, PlanError for numbers that fit no
    plan."""
    named = devices_of(devices)
    groups = _CONDITIONS if guidance == "split" else 1
    count = components or len(named) // groups
    if count * groups < 2:
        raise DeviceError(_nothing_to_spread(named))
    ranks = count * groups
    if not components and len(named) != ranks:
        odd = (
            f"AsyncDiff parallel: guidance split shares devices out between {groups} conditions, "
            f"and there are {len(named)} ({_said(named)})"
        )
        if devices.strip():
            raise DeviceError(f"{odd}. Name an even number of them, or say the components")
        log.warning("%s: %s is not used", odd, named[-1])
    if len(named) < ranks or (devices.strip() and components and len(named) != ranks):
        raise DeviceError(
            f"AsyncDiff parallel: {components or count} components"
            + (" for each of two conditions" if groups > 1 else "")
            + f" take {ranks} devices, and there are {len(named)} ({_said(named)}). Change "
            "components (0: as many as fit), or the devices"
        )
    exact = {"warmup": warmup, "exact_tail": exact_tail, "exact_mode": exact_mode}
    if schedule == "sequence":  # in which every step is exact
        exact = {}
    return ParallelConfig(
        devices=tuple(named[:ranks]),
        components=count,
        schedule=schedule,
        guidance=guidance,
        compile=_COMPILE[compile],
        compress=None if compress == "off" else compress,
        **exact,  # type: ignore[arg-type]
    )


def check_devices(config: ParallelConfig) -> None:
    """Raise DeviceError for devices that are not there, or that do not go together."""
    devices_of_ranks(config)


def devices_of(text: str) -> list[torch.device]:
    """The devices that a text names, between commas or spaces; all GPUs where it names none, else
    the CPU. Raises InputError for what is no device."""
    names = [name for name in re.split(r"[\s,;]+", text) if name]
    if not names:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return [torch.device("cuda", i) for i in range(count)] or [torch.device("cpu")]
    try:
        return [torch.device(name) for name in names]
    except RuntimeError as e:
        raise InputError(
            f"AsyncDiff parallel: devices {text!r} cannot be read; write such as "
            f'"cuda:0, cuda:1", or nothing for all GPUs ({str(e).splitlines()[0]})'
        ) from e


def _nothing_to_spread(devices: list[torch.device]) -> str:
    return (
        f"AsyncDiff parallel: there is nothing to spread over {_said(devices)}. Name the devices "
        'in the node ("cuda:0, cuda:1"), or bypass it'
    )


def _said(devices: list[torch.device]) -> str:
    return ", ".join(map(str, devices))
