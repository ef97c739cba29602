"""Guidance and the sampler's steps on one device, in one kernel.

Numbers: predictions are read in their own dtype. Everything is computed in float32 (float64 for
float64 latents), what the sampler remembers included. The latents are rounded to their own dtype
after every step, as diffusers schedulers do; the denoiser's input is rounded to its dtype. A
pipeline in half precision also rounds between the operations of guidance and step, so that it and
this lie a few roundings of the latents apart; in float32 about 1e-6.

Everything that changes from step to step or from generation to generation is device memory, indexed
by a step counter on the device: the launches can be captured in a CUDA graph and replayed.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch

from .sampler import LinearSampler

log = logging.getLogger("asyncdiff")


class Update:
    """The latents of a generation on one device, and what makes the next ones of them.

    Args:
        shape, dtype: of the latents, batch first.
        device: where they lie.
        steps, width: of the samplers that will be loaded.
        guided: predictions hold the unconditional half of their batch, then the conditional one;
            inputs for the denoiser are the latents twice.
        rescaled: guidance is rescaled.
        triton: use the kernels (None: on a GPU); else plain torch.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        steps: int,
        width: int,
        *,
        guided: bool = False,
        rescaled: bool = False,
        triton: bool | None = None,
    ) -> None:
        self.dtype = dtype
        self.guided = guided
        self.rescaled = guided and rescaled
        compute = torch.float64 if dtype is torch.float64 else torch.float32
        make = functools.partial(torch.zeros, dtype=compute, device=device)
        self.state = make(width, *shape)
        self.table = make(steps, width, width + 1)
        self.scales = make(steps + 1)
        self.guidance = make(2)  # scale, rescale
        # Weighed with zero where a tick has no prediction. It varies, or rescaling would divide 0
        # by 0.
        batch, *rest = shape
        nothing = torch.linspace(-1, 1, math.prod(shape), dtype=compute, device=device)
        self._nothing = nothing.view(batch, *rest).repeat(2 if guided else 1, *(1 for _ in rest))
        #: the next step, on the device
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self._kernels = kernels(device, triton)
        self._moments = None
        if self._kernels is not None and self.rescaled:
            self._moments = self._kernels.moments_like(self.state)

    @property
    def latents(self) -> torch.Tensor:
        """The latents now, as a new tensor in their own dtype."""
        return self.state[0].to(self.dtype, copy=True)

    def load(
        self,
        sampler: LinearSampler,
        latents: torch.Tensor,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
    ) -> None:
        """Begin a generation, in the same memory as the one before. The step counter belongs to
        :class:`asyncdiff.clock.Clock`, which rewinds it."""
        self.table.copy_(sampler.steps)
        self.scales[:-1].copy_(sampler.scales)
        self.guidance.copy_(torch.tensor([guidance_scale, guidance_rescale]))
        self.state.zero_()
        self.state[0].copy_(latents)

    def advance(self, predictions: Sequence[torch.Tensor], into: torch.Tensor | None) -> None:
        """Take one step for each prediction; then the denoiser's next input ``into`` a tensor.
        Without any, take one step whose weight for its prediction is zero.

        All are contiguous, and have the latents' batch, or twice that if guided. The step counter
        stays: the clock advances it.
        """
        run = reference if self._kernels is None else self._kernels.advance
        run(
            self.state,
            self.table,
            self.scales,
            self.step,
            self.guidance,
            list(predictions) or [self._nothing],
            into,
            dtype=self.dtype,
            guided=self.guided,
            rescaled=self.rescaled,
            moments=self._moments,
        )


def reference(
    state: torch.Tensor,
    table: torch.Tensor,
    scales: torch.Tensor,
    step: torch.Tensor,
    guidance: torch.Tensor,
    predictions: list[torch.Tensor],
    into: torch.Tensor | None,
    *,
    dtype: torch.dtype,
    guided: bool,
    rescaled: bool,
    moments: torch.Tensor | None = None,
) -> None:
    """The update in plain torch.

    ``state`` (width × latents), ``table`` (steps × width × (width + 1)), ``scales`` (steps + 1) and
    ``guidance`` (scale, rescale) have the dtype that is computed in; ``step`` is one int64.
    """
    for i, prediction in enumerate(predictions):
        noise = prediction.to(state.dtype)
        if guided:
            unconditional, conditional = noise.chunk(2)
            noise = unconditional + guidance[0] * (conditional - unconditional)
            if rescaled:
                over = tuple(range(1, noise.dim()))
                ratio = conditional.std(over, keepdim=True) / noise.std(over, keepdim=True)
                noise = noise * (guidance[1] * ratio + (1 - guidance[1]))
        weights = table.index_select(0, step + i)[0]
        inputs = torch.cat([state, noise[None]])
        # Sums of products rather than a matrix product, which may run in TF32 on a GPU.
        new = (weights.view(*weights.shape, *[1] * noise.dim()) * inputs[None]).sum(1)
        state.copy_(new)
        state[0].copy_(new[0].to(dtype))
    if into is not None:
        scaled = scales.index_select(0, step + len(predictions)) * state[0]
        into.copy_(torch.cat([scaled] * (into.shape[0] // scaled.shape[0])))


def kernels(device: torch.device, triton: bool | None) -> Any:
    """The module of Triton kernels, or None where plain torch computes."""
    if triton is False or (triton is None and device.type != "cuda"):
        return None
    return _kernels(triton is True)


@functools.cache
def _kernels(required: bool) -> Any:
    try:
        from . import update_kernels
    except ImportError as e:
        if required:
            raise
        log.warning("the sampler's update runs without its kernel, which is slower: %s", e)
        return None
    return update_kernels
