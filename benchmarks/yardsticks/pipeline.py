"""A yardstick model as a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from yardsticks.models import NOTHING, SIDE, ClassEncoder
from yardsticks.pictures import CLASSES


class _ClassPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Class to picture: calls its denoiser once a step, on [unconditional, conditional] when
    guidance is on. The latents are the pixels."""

    @property
    def num_timesteps(self) -> int:
        return len(self.scheduler.timesteps)

    def _conditions(self, labels: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def _denoise(self, sample: Tensor, time: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int = 50,
        guidance_scale: float = 2.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Draws a picture of each class in ``prompt``, names of CLASSES: PIL pictures, or with
        ``output_type="pt"`` a float tensor (batch, 3, 32, 32) in 0 … 1."""
        names = [prompt] if isinstance(prompt, str) else list(prompt)
        labels = torch.tensor([CLASSES.index(name) for name in names], device=self.device)
        guidance = guidance_scale > 1
        if guidance:
            labels = torch.cat([torch.full_like(labels, NOTHING), labels])
        conditions = self._conditions(labels)
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        if latents is None:
            shape = (len(names), 3, SIDE, SIDE)
            latents = randn_tensor(shape, generator, device=self.device, dtype=self.dtype)
        latents = latents * getattr(self.scheduler, "init_noise_sigma", 1.0)
        for t in self.progress_bar(self.scheduler.timesteps):
            sample = torch.cat([latents, latents]) if guidance else latents
            if hasattr(self.scheduler, "scale_model_input"):
                sample = self.scheduler.scale_model_input(sample, t)
            predicted = self._denoise(sample, t, conditions)
            if guidance:
                unconditional, conditional = predicted.chunk(2)
                predicted = unconditional + guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(predicted, t, latents, return_dict=False)[0]
        images: Any = (latents.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pil":
            images = self.numpy_to_pil(images.permute(0, 2, 3, 1).cpu().numpy())
        return ImagePipelineOutput(images=images)


class UNetPipeline(_ClassPipeline):
    """See :class:`_ClassPipeline`; of the UNet and its class encoder."""

    def __init__(self, unet: Any, scheduler: Any, class_encoder: ClassEncoder) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, class_encoder=class_encoder)

    def _conditions(self, labels: Tensor) -> dict[str, Tensor]:
        return {"encoder_hidden_states": self.class_encoder(labels)}

    def _denoise(self, sample: Tensor, time: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        out: Tensor = self.unet(sample, time, **conditions, return_dict=False)[0]
        return out


class TransformerPipeline(_ClassPipeline):
    """See :class:`_ClassPipeline`; of the transformer."""

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def _conditions(self, labels: Tensor) -> dict[str, Tensor]:
        return {"class_labels": labels}

    def _denoise(self, sample: Tensor, time: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        times = time.expand(sample.shape[0])
        out: Tensor = self.transformer(sample, timestep=times, **conditions, return_dict=False)[0]
        return out
