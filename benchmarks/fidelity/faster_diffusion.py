"""Faster Diffusion: the encoder's features of key steps are reused in the steps that follow.

Li et al., "Faster Diffusion: Rethinking the Role of the Encoder for Diffusion Model Inference",
NeurIPS 2024 (arXiv 2312.09608). At key steps the whole UNet runs. In the steps between only the
decoder does, on the encoder's and the bottleneck's features of the last key step, with the time
embedding of its own step. Such decoders do not read the latents: those from one key step to the
next can all run at once, over several devices.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from fidelity.macs import total, within
from fidelity.method import Method, Work

#: The paper's key steps of 50 (its t_key = {50, 49, 48, 47, 45, 40, 35, 25, 15} counts down).
PAPER = (0, 1, 2, 3, 5, 10, 15, 25, 35)


def paper_keys(steps: int) -> tuple[int, ...]:
    """The paper's non-uniform key steps, at the same places among ``steps``."""
    return tuple(sorted({k * steps // 50 for k in PAPER}))


class FasterDiffusion(Method):
    """Encoder propagation with parallel decoding on ``devices`` devices.

    ``keys`` gives the key steps of a generation of so many steps; the first step is always one.
    """

    def __init__(self, name: str, devices: int, keys: Callable[[int], Sequence[int]]) -> None:
        self.name = name
        self.devices = devices
        self._keys = keys

    @contextlib.contextmanager
    def applied(self, pipe: Any, steps: int) -> Iterator[int]:
        """See :class:`Method`."""
        unet = pipe.unet
        keys = {0, *self._keys(steps)}
        now = itertools.count()
        state = {"key": True}
        encoder = [unet.conv_in, *unet.down_blocks, unet.mid_block]

        def whole(*args: Any, **kwargs: Any) -> Any:
            state["key"] = next(now) in keys
            return forward(*args, **kwargs)

        forward = unet.forward
        unet.forward = whole
        try:
            for module in encoder:
                _reuse(module, state)
            yield steps
        finally:
            for module in [unet, *encoder]:
                module.__dict__.pop("forward", None)

    def work(self, pipe: Any, call: Mapping[str, Any], steps: int) -> Work:
        """Encoders of key steps, one after another; decoders of a stretch on all devices."""
        blocks = [f"down_blocks.{i}" for i in range(len(pipe.unet.down_blocks))]
        encoder = within(pipe, ["conv_in", *blocks, "mid_block"])
        decoder = total(pipe) - encoder
        keys = [*sorted({0, *self._keys(steps)}), steps]
        critical = 0.0
        for begin, end in itertools.pairwise(keys):
            critical += encoder + decoder * math.ceil((end - begin) / self.devices)
        return Work(critical, critical)


def _reuse(module: nn.Module, state: Mapping[str, bool]) -> None:
    """Let ``module`` return what it returned last, unless it is a key step."""
    forward = module.forward
    kept: list[Any] = []

    def reusing(*args: Any, **kwargs: Any) -> Any:
        if state["key"]:
            kept[:] = [forward(*args, **kwargs)]
        return kept[0]

    module.forward = reusing  # type: ignore[method-assign]
