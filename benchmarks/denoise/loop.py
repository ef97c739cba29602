"""The denoising loop that every way of running a denoiser is timed with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

#: One evaluation of the denoiser: its arguments and which of a step's calls it is, then the noise
#: prediction.
Denoise = Callable[[dict[str, Any], int], torch.Tensor]


class Loop:
    """A generation with guidance: DDIM steps from fixed noise, the conditioning fixed.

    ``inputs`` are keyword arguments of one call of the denoiser; a batch of twice the ``pictures``
    is pairs, all unconditional rows first. With ``branches=2`` guidance is a second call in each
    step instead, with another text. The denoiser gets the scheduler's timesteps over
    ``timestep_divisor``.
    """

    def __init__(
        self,
        inputs: dict[str, Any],
        steps: int,
        guidance_scale: float = 5.0,
        timestep_divisor: float = 1.0,
        pictures: int = 1,
        branches: int = 1,
    ) -> None:
        from diffusers import DDIMScheduler

        self.scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        )
        self.scheduler.set_timesteps(steps)
        self.name = "sample" if "sample" in inputs else "hidden_states"
        self.noise: torch.Tensor = inputs[self.name]
        self.pictures = pictures
        self.guided = self.noise.shape[0] == 2 * pictures
        self.inputs = inputs
        #: Of each call of a step. Made once, as pipelines make them.
        self.calls = [inputs]
        if branches == 2:
            text = inputs["encoder_hidden_states"]
            self.calls = [{**inputs, "encoder_hidden_states": text.flip(1)}, inputs]
        self.guidance_scale = guidance_scale
        #: The denoiser's timesteps, on its device, so that no step waits for a transfer.
        time = inputs["timestep"]
        self.timesteps = (self.scheduler.timesteps / timestep_divisor).to(time.device, time.dtype)
        # Views: as with pipelines, a call's timestep is then known without a look at its value.
        self._times = [t.expand(inputs["timestep"].shape) for t in self.timesteps]

    @torch.no_grad()
    def __call__(self, denoise: Denoise) -> torch.Tensor:
        """The final latents."""
        latents = self.noise[: self.pictures].clone()
        # A denoiser that takes more channels than it gives gets an image beside the latents.
        beside: torch.Tensor | None = None
        for k, time in enumerate(self._times):
            sample = latents if beside is None else torch.cat([latents, beside], dim=-3)
            if self.guided:
                sample = torch.cat([sample, sample])
            moving = {self.name: sample, "timestep": time}
            each = [denoise({**call, **moving}, n) for n, call in enumerate(self.calls)]
            predicted = each[-1]
            if k == 0 and predicted.shape[-3] != latents.shape[-3]:
                beside = latents.narrow(
                    -3, predicted.shape[-3], latents.shape[-3] - predicted.shape[-3]
                )
                latents = latents.narrow(-3, 0, predicted.shape[-3])
            if self.guided:
                each = list(predicted.chunk(2))
            if len(each) == 2:
                unconditional, conditional = each
                predicted = unconditional + self.guidance_scale * (conditional - unconditional)
            t = int(self.scheduler.timesteps[k])
            latents = self.scheduler.step(predicted, t, latents, return_dict=False)[0]
        return latents
