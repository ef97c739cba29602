"""A pipeline's generation, from the first call of its denoiser."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import InputError
from ...graph.signature import Call, Role
from ...sampling.linear import linearize
from .timesteps import TimestepTracker


class FirstCall(BaseException):
    """Ends a pipeline's run at its first call of the denoiser. No Exception, which it may catch."""

    def __init__(self, call: Call) -> None:
        super().__init__("the pipeline was only wanted for its first step")
        self.call = call


def as_generation(pipe: Any, call: Call) -> dict[str, Any]:
    """The arguments of :meth:`asyncdiff.AsyncDenoiser.calibrate` for the generation that begins so.

    Guidance is what ``pipe.guidance_scale`` says, where both halves of the batch hold the same
    latents. Raises InputError where the generation begins in the middle of a schedule, or its
    denoiser takes no timestep.
    """
    scheduler = pipe.scheduler
    latents, time = (call.indices(role) for role in (Role.LATENTS, Role.TIMESTEP))
    names = [call.signature.inputs[i].name for i in (*latents, *time)]
    if len(latents) != 1 or len(time) != 1:
        raise InputError(
            f"{', '.join(names)} change from step to step, where latents and a timestep were "
            "expected: calibrate with AsyncDenoiser.calibrate()"
        )
    z, t = call.tensors[latents[0]], call.tensors[time[0]]
    times = TimestepTracker(scheduler, t)
    if times.start:
        raise InputError(
            f"the pipeline begins at step {times.start} of its schedule: calibrate on whole "
            "generations"
        )
    scale = float(getattr(pipe, "guidance_scale", 1.0) or 1.0)
    half = len(z) // 2
    guided = scale > 1 and len(z) % 2 == 0 and torch.equal(z[:half], z[half:])
    first = float(linearize(scheduler).scales[0])

    def argument(timestep: torch.Tensor) -> torch.Tensor:
        index = int((times.source == timestep).nonzero()[0])
        return times.values[index].expand(t.shape)

    return {
        "latents": (z[:half] if guided else z).float() / first,
        "conditioning": {k: v for k, v in call.kwargs().items() if k not in names},
        "scheduler": scheduler,
        "guidance_scale": scale if guided else 1.0,
        "guidance_rescale": float(getattr(pipe, "guidance_rescale", 0.0) or 0.0),
        "timestep_argument": argument,
    }
