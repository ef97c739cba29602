"""Which devices a command takes, checked before a model is loaded."""

from __future__ import annotations

from .console import remark
from .options import read_devices


def pick(text: str | None, components: int, stride: int, groups: int = 1) -> list[str]:
    """One device a rank, from ``--devices`` or by default (all GPUs in turn, else the CPU).

    Says so where ranks share a device: that is correct and not faster, and nobody should be left
    to wonder. Raises DeviceError for devices that do not fit the ranks or this machine.
    """
    from ..runtime.devices import resolve

    ranks = groups * (components + stride - 1)
    devices = [str(d) for d in resolve(read_devices(text, ranks), ranks)]
    if len(set(devices)) < len(devices):
        shared = "the CPU" if set(devices) == {"cpu"} else ", ".join(sorted(set(devices)))
        remark(
            f"{ranks} ranks share {shared}: the pictures are those of {ranks} devices, "
            "the times are not"
        )
    return devices
