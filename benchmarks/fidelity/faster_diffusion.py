"""Faster Diffusion: the encoder's features of key steps are reused in the steps that follow.

Li et al., "Faster Diffusion: Rethinking the Role of the Encoder for Diffusion Model Inference",
NeurIPS 2024 (arXiv 2312.09608). At key steps the whole UNet runs. In the steps between only the
decoder does, on the encoder's and the bottleneck's features of the last key step, with the time
embedding of its own step. Such decoders do not read the latents: those from one key step to the
next can all run at once, over several devices.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from asyncdiff_bench.errors import BenchError
from fidelity.macs import total, within
from fidelity.method import Method, Work
from fidelity.replaced import replacing

#: The paper's key steps of 50 (its t_key = {50, 49, 48, 47, 45, 40, 35, 25, 15} counts down).
PAPER = (0, 1, 2, 3, 5, 10, 15, 25, 35)
#: Prior noise: this much of the first latents is added in the second half of the time steps.
NOISE = 0.003


def paper_keys(steps: int) -> tuple[int, ...]:
    """The paper's non-uniform key steps, at the same places among ``steps``."""
    return tuple(sorted({k * steps // 50 for k in PAPER}))


class FasterDiffusion(Method):
    """Encoder propagation with parallel decoding on ``devices`` devices.

    ``keys`` gives the key steps of a generation of so many steps; the first step is always one.
    ``prior_noise`` adds the paper's prior noise injection, against its loss of texture.
    Raises BenchError where there are no devices, or a key step is none of the generation's.
    """

    def __init__(
        self,
        name: str,
        devices: int,
        keys: Callable[[int], Sequence[int]],
        *,
        prior_noise: bool = False,
    ) -> None:
        if devices < 1:
            raise BenchError(f"Faster Diffusion needs a device, not {devices}")
        self.name = name
        self.devices = devices
        self.prior_noise = prior_noise
        self._keys = keys

    @contextlib.contextmanager
    def applied(self, pipe: Any, steps: int) -> Iterator[int]:
        """See :class:`Method`. For one generation, whose UNet is called once a step."""
        unet = pipe.unet
        keys = self._key_steps(steps)
        now = itertools.count()
        state = {"key": True}
        forward = unet.forward

        def whole(*args: Any, **kwargs: Any) -> Any:
            state["key"] = next(now) in keys
            return forward(*args, **kwargs)

        with replacing() as replace:
            replace(unet, "forward", whole)
            for path in _encoder(unet):
                module = unet.get_submodule(path)
                replace(module, "forward", _reusing(module, state))
            if self.prior_noise:
                replace(pipe.scheduler, "step", _with_prior_noise(pipe.scheduler))
            yield steps

    def work(self, pipe: Any, call: Mapping[str, Any], steps: int) -> Work:
        """Encoders of key steps, one after another; decoders of a stretch on all devices.

        The device that runs the encoders also takes the largest share of every stretch.
        """
        encoder = within(pipe, _encoder(pipe.unet))
        decoder = total(pipe) - encoder
        critical = 0.0
        for begin, end in itertools.pairwise([*sorted(self._key_steps(steps)), steps]):
            critical += encoder + decoder * math.ceil((end - begin) / self.devices)
        return Work(critical, critical)

    def settings(self, pipe: Any, steps: int) -> dict[str, Any]:
        """See :class:`Method`."""
        return {"prior_noise": NOISE} if self.prior_noise else {}

    def _key_steps(self, steps: int) -> set[int]:
        keys = {0, *self._keys(steps)}
        if outside := sorted(k for k in keys if not 0 <= k < steps):
            raise BenchError(f"{self.name}: key steps {outside} are not among {steps} steps")
        return keys


def _encoder(unet: Any) -> list[str]:
    """Paths of what makes the features that the decoder reads."""
    blocks = [f"down_blocks.{i}" for i in range(len(unet.down_blocks))]
    return ["conv_in", *blocks, *(["mid_block"] if unet.mid_block is not None else [])]


def _reusing(module: nn.Module, state: Mapping[str, bool]) -> Callable[..., Any]:
    """What ``module`` returned last, unless it is a key step."""
    forward = module.forward
    kept: list[Any] = []

    def reusing(*args: Any, **kwargs: Any) -> Any:
        if state["key"]:
            kept[:] = [forward(*args, **kwargs)]
        return kept[0]

    return reusing


def _with_prior_noise(scheduler: Any) -> Callable[..., Any]:
    """``scheduler.step`` whose latents for a time in the second half get some of the first ones."""
    step = scheduler.step
    first: list[Any] = []
    now = itertools.count(1)

    @functools.wraps(step)  # pipelines ask for its parameters
    def noisy(model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        if not first:
            first.append(sample)
        out = step(model_output, timestep, sample, *args, **kwargs)
        upcoming = scheduler.timesteps[next(now) :][:1]
        if len(upcoming) and upcoming[0] < scheduler.config.num_train_timesteps / 2:
            if isinstance(out, tuple):
                return (out[0] + NOISE * first[0], *out[1:])
            out.prev_sample = out.prev_sample + NOISE * first[0]
        return out

    return noisy
