"""What a scheduler has to be like, so that asynchronous denoising can serve it."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import SchedulerError


def check_scheduler(scheduler: Any) -> torch.Tensor:
    """The scheduler's timesteps, one for each time that it is given a prediction; raises
    SchedulerError where there are none."""
    timesteps = getattr(scheduler, "timesteps", None)
    if not isinstance(timesteps, torch.Tensor) or timesteps.dim() != 1 or len(timesteps) == 0:
        raise SchedulerError(
            f"{type(scheduler).__name__} has no list of timesteps: call scheduler.set_timesteps() "
            "before the denoiser"
        )
    return timesteps


def check_order(scheduler: Any) -> None:
    """Raise SchedulerError for one that evaluates the denoiser several times in a step: Heun, and
    DPM-Solvers of second order in one step. What is made of its second predictions depends on what
    was made of the first, and no wave has a time that is known beforehand."""
    order = getattr(scheduler, "order", 1)
    if order != 1:
        raise SchedulerError(
            f"{type(scheduler).__name__} calls the denoiser {order} times a step (order={order}), "
            "which waves do not serve: take schedule='asyncdiff', or a scheduler that calls it "
            "once, such as DDIM, Euler, DPMSolverMultistep or UniPC"
        )
