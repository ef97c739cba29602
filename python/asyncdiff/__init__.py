"""Asynchronous denoising of diffusion models over several GPUs (AsyncDiff, NeurIPS 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import errors
from .errors import (
    AsyncDiffError,
    BatchError,
    CaptureError,
    DeviceError,
    InputError,
    MemoryLimitError,
    MetricError,
    MismatchError,
    PartitionError,
    PlanError,
    ProcessError,
    RankError,
    SchedulerError,
    TokensError,
    TuneError,
)

if TYPE_CHECKING:
    from .config import ParallelConfig
    from .denoiser import AsyncDenoiser
    from .integrations.diffusers.handle import Handle
    from .integrations.diffusers.pipeline import parallelize, restore
    from .sampling.auto_warmup import AutoWarmup
    from .sampling.calibration import Calibration

__version__ = "0.1.0"

__all__ = [
    "AsyncDenoiser",
    "AsyncDiffError",
    "AutoWarmup",
    "BatchError",
    "Calibration",
    "CaptureError",
    "DeviceError",
    "Handle",
    "InputError",
    "MemoryLimitError",
    "MetricError",
    "MismatchError",
    "ParallelConfig",
    "PartitionError",
    "PlanError",
    "ProcessError",
    "RankError",
    "SchedulerError",
    "TokensError",
    "TuneError",
    "errors",
    "parallelize",
    "restore",
]

_LAZY = {
    "AsyncDenoiser": "denoiser",
    "ParallelConfig": "config",
    "AutoWarmup": "sampling.auto_warmup",
    "Calibration": "sampling.calibration",
    "Handle": "integrations.diffusers.handle",
    "parallelize": "integrations.diffusers.pipeline",
    "restore": "integrations.diffusers.pipeline",
}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: plans and the command line's help do without it.
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
