"""What the texts of options mean."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import DeviceError, InputError, PlanError


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


def read_sizes(flag: str, text: str) -> list[str]:
    """``10GB,22GB`` as a list of sizes. Raises InputError for what is none, and for a number
    without a unit: 24 would be bytes, and whoever writes that means gigabytes."""
    sizes = [size.strip() for size in text.split(",")]
    if not all(map(_is_size, sizes)):
        raise InputError(f"{flag} {text!r}: write sizes as 10GB,22GB or 9.5GiB, with their units")
    return sizes


def _is_size(text: str) -> bool:
    """Whether a text is a byte or more, and not more than anybody has."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+) *([KMGT]i?B?|B)", text, re.I)
    return (
        found is not None
        and 1 <= float(found[1]) * 1000 ** "BKMGT".index(found[2][0].upper()) < 1e18
    )


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
