"""What a scheduler has to be like, so that asynchronous denoising can serve it."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import SchedulerError


def check_scheduler(scheduler: Any) -> torch.Tensor:
    """The scheduler's timesteps; raises SchedulerError if it cannot be served."""
    name = type(scheduler).__name__
    order = getattr(scheduler, "order", 1)
    if order != 1:
        raise SchedulerError(
            f"{name} calls the denoiser {order} times a step (order={order}): asynchronous "
            "denoising serves schedulers that call it once, such as DDIM, Euler, "
            "DPMSolverMultistep or UniPC"
        )
    timesteps = getattr(scheduler, "timesteps", None)
    if not isinstance(timesteps, torch.Tensor) or timesteps.dim() != 1 or len(timesteps) == 0:
        raise SchedulerError(
            f"{name} has no list of timesteps: call scheduler.set_timesteps() before the denoiser"
        )
    return timesteps
