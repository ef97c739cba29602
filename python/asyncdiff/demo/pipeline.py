"""The demo model as a diffusers pipeline. asyncdiff.demo.load imports this lazily."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from torch.nn.functional import pixel_shuffle

from asyncdiff.demo.words import Vocabulary, WordEncoder
from asyncdiff.errors import InputError

SCHEDULERS = ("ddim", "dpm", "euler")


def make_scheduler(name: str, config: dict[str, Any]) -> Any:
    """One of the three samplers over the noise schedule that the model was trained with."""
    if name == "ddim":
        # Without clipping: diffusers clips the predicted picture but not the predicted noise that
        # goes with it, and with guidance that leaves grain.
        return DDIMScheduler(**config, clip_sample=False)
    if name == "dpm":
        return DPMSolverMultistepScheduler(**config)
    if name == "euler":
        return EulerDiscreteScheduler(**config)
    raise InputError(f"unknown scheduler '{name}': choose one of {', '.join(SCHEDULERS)}")


@dataclass
class EmojiPipelineOutput(BaseOutput):  # type: ignore[misc]
    """``images``: PIL pictures, an array ``[n, height, width, 3]`` in [0, 1], or latents."""

    images: list[Image.Image] | np.ndarray | Tensor


class EmojiPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Text to emoji, with the parts of Stable Diffusion and its way of calling them.

    Its latents are the pixels themselves: ``patch`` x ``patch`` blocks folded into channels (no
    autoencoder). ``unet`` is called exactly once a step, on the batch [unconditional, conditional]
    when guidance is on. ``save_pretrained(folder)`` and ``EmojiPipeline.from_pretrained(folder)``
    are those of diffusers.
    """

    model_cpu_offload_seq = "word_encoder->unet"
    _callback_tensor_inputs = ("latents", "prompt_embeds")

    def __init__(self, unet: Any, scheduler: Any, word_encoder: WordEncoder) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, word_encoder=word_encoder)
        self.tokenizer: Vocabulary = word_encoder.vocabulary

    @property
    def patch(self) -> int:
        """Pixels on the side of a block that is folded into channels."""
        return math.isqrt(int(self.unet.config.in_channels) // 3)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1.0

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    def encode_prompt(self, prompt: str | list[str], guidance: bool) -> Tensor:
        """Word states of [unconditional, conditional] (guidance) or of the prompts alone."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        tokens = self.tokenizer([""] * len(prompts) + prompts if guidance else prompts)
        states: Tensor = self.word_encoder(tokens.to(self.word_encoder.device))
        return states

    def prepare_latents(
        self,
        batch: int,
        height: int,
        width: int,
        generator: Any = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        device, dtype = self.word_encoder.device, self.word_encoder.dtype
        shape = (
            batch,
            int(self.unet.config.in_channels),
            height // self.patch,
            width // self.patch,
        )
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise InputError(f"latents have the shape {tuple(latents.shape)}, {shape} is needed")
        scaled: Tensor = latents.to(device=device, dtype=dtype) * self.scheduler.init_noise_sigma
        return scaled

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of final latents: float32 (batch, 3, height, width) in 0 … 1."""
        return (pixel_shuffle(latents.float(), self.patch) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int = 50,
        guidance_scale: float = 2.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        height: int = 64,
        width: int = 64,
        output_type: str = "pil",
        return_dict: bool = True,
        eta: float = 0.0,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Tensor]], dict[str, Tensor]]
        | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
    ) -> EmojiPipelineOutput | tuple[Any]:
        """Draws ``prompt``. Arguments mean what they mean in diffusers' StableDiffusionPipeline."""
        if not isinstance(prompt, (str, list, tuple)) or (
            not len(prompt) and not isinstance(prompt, str)
        ):
            raise InputError("prompt is a string or a non-empty list of strings")
        side = self.patch * 4
        if height < side or width < side or height % side or width % side:
            raise InputError(
                f"height and width are multiples of {side} (the model was trained at 64), "
                f"not {height}x{width}"
            )
        if num_inference_steps < 1:
            raise InputError(f"num_inference_steps is at least 1, not {num_inference_steps}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise InputError(f"output_type is 'pil', 'np', 'pt' or 'latent', not '{output_type}'")
        self._guidance_scale = float(guidance_scale)
        batch = 1 if isinstance(prompt, str) else len(prompt)
        guidance = self.do_classifier_free_guidance

        prompt_embeds = self.encode_prompt(
            prompt if isinstance(prompt, str) else list(prompt), guidance
        )
        self.scheduler.set_timesteps(num_inference_steps, device=prompt_embeds.device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        latents = self.prepare_latents(batch, height, width, generator, latents)

        accepted = inspect.signature(self.scheduler.step).parameters
        extra: dict[str, Any] = {}
        if "eta" in accepted:
            extra["eta"] = eta
        if "generator" in accepted:
            extra["generator"] = generator

        with self.progress_bar(total=len(timesteps)) as bar:
            for i, t in enumerate(timesteps):
                sample = torch.cat([latents, latents]) if guidance else latents
                sample = self.scheduler.scale_model_input(sample, t)
                predicted = self.unet(
                    sample, t, encoder_hidden_states=prompt_embeds, return_dict=False
                )[0]
                if guidance:
                    unconditional, conditional = predicted.chunk(2)
                    predicted = unconditional + guidance_scale * (conditional - unconditional)
                latents = self.scheduler.step(predicted, t, latents, **extra, return_dict=False)[0]
                if callback_on_step_end is not None:
                    known = {"latents": latents, "prompt_embeds": prompt_embeds}
                    given = {name: known[name] for name in callback_on_step_end_tensor_inputs}
                    answer = callback_on_step_end(self, i, t, given) or {}
                    latents = answer.get("latents", latents)
                    prompt_embeds = answer.get("prompt_embeds", prompt_embeds)
                bar.update()

        assert latents is not None
        images: Any = latents
        if output_type != "latent":
            images = self.decode(latents)
        if output_type in ("np", "pil"):
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = [
                Image.fromarray((picture * 255).round().astype(np.uint8)) for picture in images
            ]
        self.maybe_free_model_hooks()
        return EmojiPipelineOutput(images=images) if return_dict else (images,)
