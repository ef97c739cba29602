"""Which devices a command takes when the user names none."""

from __future__ import annotations

from collections.abc import Sequence

from .console import remark


def default_devices(ranks: int) -> list[str]:
    """GPUs in turn, one a rank where there are enough; else the CPU for every rank."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [f"cuda:{r % gpus}" for r in range(ranks)] if gpus else ["cpu"] * ranks


def say_if_shared(devices: Sequence[str]) -> None:
    """Ranks that share a device are correct and not faster: nobody should be left to wonder."""
    if len(set(devices)) < len(devices):
        shared = "the CPU" if set(devices) == {"cpu"} else ", ".join(sorted(set(devices)))
        remark(
            f"{len(devices)} ranks share {shared}: the pictures are those of {len(devices)} "
            "devices, the times are not"
        )
