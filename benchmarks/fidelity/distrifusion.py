"""DistriFusion: each device denoises a patch, with the neighbours' activations of the step before.

Li et al., "DistriFusion: Distributed Parallel Inference for High-Resolution Diffusion Models",
CVPR 2024 (arXiv 2402.19481). The latents are cut into horizontal patches, one a device. What a
layer needs of other patches (the rows beside a convolution's border, self-attention's keys and
values, the statistics of a group norm) comes from the step before; the first steps are synchronous.

All patches run here on one device, layer by layer: a layer gets the whole picture, whose patches
are what the devices made, and computes them side by side along the batch.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from asyncdiff.integrations.diffusers.denoisers import find_denoiser
from asyncdiff_bench.errors import BenchError
from fidelity.macs import total
from fidelity.method import Method, Work
from fidelity.replaced import replacing

#: What reads the latents, in UNets and in transformers.
_FIRST = ("conv_in", "pos_embed.proj")


class DistriFusion(Method):
    """Displaced patch parallelism on ``patches`` devices; the first ``synchronous`` steps exact.

    Raises BenchError where there are no patches or no synchronous step: the first step has nothing
    stale to go by.
    """

    def __init__(self, patches: int, synchronous: int) -> None:
        if patches < 1 or synchronous < 1:
            raise BenchError(
                f"DistriFusion needs a patch and a synchronous step, not {patches} and "
                f"{synchronous}"
            )
        self.name = f"DistriFusion, {patches} patches, {synchronous} synchronous"
        self.devices = patches
        self.synchronous = synchronous

    @contextlib.contextmanager
    def applied(self, pipe: Any, steps: int) -> Iterator[int]:
        """See :class:`Method`. For one generation, whose denoiser is called once a step.

        Raises BenchError for attention that it does not know, and, when it runs, for a layer whose
        rows cannot be dealt out evenly.
        """
        denoiser = find_denoiser(pipe)
        state = _State(self.devices)
        now = itertools.count()
        forward = denoiser.forward

        def whole(*args: Any, **kwargs: Any) -> Any:
            state.fresh = next(now) < self.synchronous
            return forward(*args, **kwargs)

        with replacing() as replace:
            replace(denoiser, "forward", whole)
            for name, module in denoiser.named_modules():
                # Every device has all of the latents, which are gathered after each step.
                if name not in _FIRST and (make := _maker(module)) is not None:
                    replace(module, "forward", make(module, state))
            yield steps

    def work(self, pipe: Any, call: Mapping[str, Any], steps: int) -> Work:
        """An equal share for each device: each attends from its own rows to all."""
        macs = float(total(pipe)) * steps / self.devices
        return Work(macs, macs)

    def settings(self, pipe: Any, steps: int) -> dict[str, Any]:
        """See :class:`Method`. Results of a first layer with stale neighbours are others."""
        return {"first_layer": "fresh"}


@dataclass
class _State:
    """What all layers share: the number of patches, and whether this step is synchronous."""

    patches: int
    fresh: bool = True

    def dealt(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """``x`` cut along ``dim``; the patches are a new first dimension (a view)."""
        if x.shape[dim] % self.patches:
            raise BenchError(
                f"{x.shape[dim]} rows or pixels of a layer cannot be dealt out to {self.patches} "
                "patches: take fewer patches or larger pictures"
            )
        return x.unflatten(dim, (self.patches, -1)).movedim(dim, 0)


def _joined(patches: torch.Tensor, dim: int) -> torch.Tensor:
    """The whole of patches that lie along a first dimension: the opposite of ``dealt``."""
    return patches.movedim(0, dim).flatten(dim, dim + 1)


_Forward = Callable[..., torch.Tensor]


def _maker(module: nn.Module) -> Callable[[Any, _State], _Forward] | None:
    """What displaces this layer; None where it is local, or part of such a layer."""
    if isinstance(module, nn.Conv2d):
        return None if module.kernel_size[0] == 1 else _convolution
    if isinstance(module, nn.GroupNorm):
        return _group_norm
    if type(module).__name__ == "Attention" and not module.is_cross_attention:
        return _attention
    return None


def _convolution(layer: nn.Conv2d, state: _State) -> _Forward:
    """Fresh rows of the patch's own between the neighbours' stale ones."""
    forward = layer.forward
    size, stride, step = layer.kernel_size[0], layer.stride[0], layer.dilation[0]
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise BenchError(f"DistriFusion knows convolutions padded with zeros, not {layer}")
    above, across = layer.padding
    # A patch begins where its first output's stride does, so that below may need fewer rows.
    below = max(0, (size - 1) * step + 1 - stride - above)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def beside(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows above and below each patch; beyond the picture's edge they are zeros."""
        rows = x.shape[2] // state.patches
        padded = F.pad(x, (0, 0, above, below))
        starts = [rows * p for p in range(state.patches)]
        return (
            torch.stack([padded.narrow(2, s, above) for s in starts]),
            torch.stack([padded.narrow(2, s + above + rows, below) for s in starts]),
        )

    def displaced(x: torch.Tensor) -> torch.Tensor:
        mine = state.dealt(x, 2)
        if mine.shape[3] % stride:
            raise BenchError(
                f"patches of {mine.shape[3]} rows cannot be halved: take fewer patches or larger "
                "pictures"
            )
        stale = kept[:]
        kept[:] = [beside(x)]
        if state.fresh:
            return forward(x)
        seen = torch.cat([stale[0][0], mine, stale[0][1]], dim=3)
        out = F.conv2d(
            seen.flatten(0, 1),
            layer.weight,
            layer.bias,
            layer.stride,
            (0, across),
            layer.dilation,
            layer.groups,
        )
        return _joined(out.unflatten(0, seen.shape[:2]), 2)

    return displaced


def _group_norm(layer: nn.GroupNorm, state: _State) -> _Forward:
    """Statistics are the stale ones of the whole, corrected by how a patch's own have changed."""
    forward = layer.forward
    kept: list[torch.Tensor] = []

    def displaced(x: torch.Tensor) -> torch.Tensor:
        mine = state.dealt(x, 2)
        groups = mine.unflatten(2, (layer.num_groups, -1)).flatten(3)
        # In half precision a square may be infinite, and the difference below nothing but rounding.
        groups = groups if groups.dtype == torch.float64 else groups.float()
        moments = torch.stack([groups.mean(-1), groups.square().mean(-1)])
        stale = kept[:]
        kept[:] = [moments]
        if state.fresh:
            return forward(x)
        mean, square = stale[0].mean(1, keepdim=True) + moments - stale[0]
        variance = square - mean.square()
        # Where the correction leaves no variance, the patch's own is what remains.
        variance = torch.where(variance < 0, moments[1] - moments[0].square(), variance)
        out = (groups - mean[..., None]) * (variance[..., None] + layer.eps).rsqrt()
        whole = _joined(out.reshape(mine.shape), 2)
        if layer.affine:
            over = (-1, *[1] * (x.dim() - 2))
            whole = whole * layer.weight.view(over) + layer.bias.view(over)
        return whole.to(x.dtype)

    return displaced


def _attention(layer: Any, state: _State) -> _Forward:
    """A patch's pixels attend to its own fresh pixels and everybody else's stale ones.

    Keys and values are made from each pixel by itself: those of stale pixels are the stale ones.
    """
    forward = layer.forward
    kept: list[torch.Tensor] = []
    if layer.group_norm is not None or layer.spatial_norm is not None or layer.residual_connection:
        raise BenchError("DistriFusion knows the attention of transformer blocks only")

    def displaced(
        x: torch.Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None, **more: Any
    ) -> torch.Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise BenchError("DistriFusion knows self-attention without a mask only")
        mine = state.dealt(x, 1)
        stale = kept[:]
        kept[:] = [x]
        if state.fresh:
            return forward(x, **more)
        seen = stale[0].expand(state.patches, *x.shape).clone()
        for patch, (all_of_it, own) in enumerate(zip(seen, mine, strict=True)):
            all_of_it[:, patch * own.shape[1] : (patch + 1) * own.shape[1]] = own
        out = forward(mine.flatten(0, 1), encoder_hidden_states=seen.flatten(0, 1), **more)
        return _joined(out.unflatten(0, mine.shape[:2]), 1)

    return displaced
