"""DistriFusion: each device denoises a patch, with the neighbours' activations of the step before.

Li et al., "DistriFusion: Distributed Parallel Inference for High-Resolution Diffusion Models",
CVPR 2024 (arXiv 2402.19481). The latents are cut into horizontal patches, one a device. What a
layer needs of other patches (the rows beside a convolution's border, self-attention's keys and
values, the statistics of a group norm) comes from the step before; the first steps are synchronous.

All patches run here on one device, layer by layer on the whole picture. A layer has the inputs of
the last step and computes, for each patch, what its device would have: from its own fresh rows and
everybody else's stale ones.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fidelity.macs import total
from fidelity.method import Method, Work


class DistriFusion(Method):
    """Displaced patch parallelism on ``patches`` devices; the first ``synchronous`` steps exact."""

    def __init__(self, patches: int, synchronous: int) -> None:
        self.name = f"DistriFusion, {patches} patches, {synchronous} synchronous"
        self.devices = patches
        self.synchronous = synchronous

    @contextlib.contextmanager
    def applied(self, pipe: Any, steps: int) -> Iterator[int]:
        """See :class:`Method`. The height of every layer's input must divide by the patches."""
        unet = pipe.unet
        state = _State(self.devices)
        now = itertools.count()
        forward = unet.forward

        def whole(*args: Any, **kwargs: Any) -> Any:
            state.fresh = next(now) < self.synchronous
            return forward(*args, **kwargs)

        changed: list[nn.Module] = [unet]
        unet.forward = whole
        try:
            for module in unet.modules():
                make = _LAYERS.get(type(module))
                if type(module).__name__ == "Attention" and not module.is_cross_attention:
                    make = _attention
                if make is not None:
                    module.forward = make(module, state)
                    changed.append(module)
            yield steps
        finally:
            for module in changed:
                module.__dict__.pop("forward", None)

    def work(self, pipe: Any, call: Mapping[str, Any], steps: int) -> Work:
        """An equal share for each device: each attends from its own rows to all."""
        macs = float(total(pipe)) * steps / self.devices
        return Work(macs, macs)


class _State:
    """What all layers share: the number of patches, and whether this step is synchronous."""

    def __init__(self, patches: int) -> None:
        self.patches = patches
        self.fresh = True


def _mixed(fresh: torch.Tensor, stale: torch.Tensor, patch: int, patches: int) -> torch.Tensor:
    """The input as a device sees it: its own rows fresh, all others stale. Rows are dimension 2."""
    rows = fresh.shape[2] // patches
    seen = stale.clone()
    seen[:, :, patch * rows : (patch + 1) * rows] = fresh[:, :, patch * rows : (patch + 1) * rows]
    return seen


def _rows(value: torch.Tensor, patch: int, patches: int, dim: int = 2) -> torch.Tensor:
    size = value.shape[dim] // patches
    return value.narrow(dim, patch * size, size)


def _convolution(layer: nn.Module, state: _State) -> Callable[..., torch.Tensor]:
    forward = layer.forward
    last: list[torch.Tensor] = []

    def displaced(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        stale = x if state.fresh or not last else last[0]
        last[:] = [x]
        if stale is x or layer.kernel_size == (1, 1):
            return forward(x, *args, **kwargs)
        outs = [
            _rows(forward(_mixed(x, stale, p, state.patches), *args, **kwargs), p, state.patches)
            for p in range(state.patches)
        ]
        return torch.cat(outs, dim=2)

    return displaced


def _group_norm(layer: nn.Module, state: _State) -> Callable[..., torch.Tensor]:
    """Statistics are the stale ones of the whole, corrected by how a patch's own have changed."""
    forward = layer.forward
    last: list[torch.Tensor] = []

    def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        groups = x.reshape(x.shape[0], layer.num_groups, -1)
        return groups.mean(-1), (groups**2).mean(-1)

    def displaced(x: torch.Tensor) -> torch.Tensor:
        stale = x if state.fresh or not last else last[0]
        last[:] = [x]
        if stale is x:
            return forward(x)
        # Attention blocks normalise sequences of all pixels, in order of rows.
        rows = 2
        whole_mean, whole_square = moments(stale)
        outs = []
        for p in range(state.patches):
            mine, before = (_rows(v, p, state.patches, rows) for v in (x, stale))
            mean, square = moments(mine)
            old_mean, old_square = moments(before)
            corrected = whole_mean + mean - old_mean
            variance = whole_square + square - old_square - corrected**2
            # Where the correction leaves no variance, the patch's own is what remains.
            variance = torch.where(variance < 0, square - mean**2, variance)
            outs.append(_normalised(mine, corrected, variance, layer))
        return torch.cat(outs, dim=rows)

    return displaced


def _normalised(
    x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, layer: Any
) -> torch.Tensor:
    groups = x.reshape(x.shape[0], layer.num_groups, -1)
    scale = (variance + layer.eps).rsqrt()
    out = ((groups - mean[..., None]) * scale[..., None]).reshape(x.shape)
    over = (1, -1, *[1] * (x.dim() - 2))
    return out * layer.weight.view(over) + layer.bias.view(over)


def _attention(layer: Any, state: _State) -> Callable[..., torch.Tensor]:
    """A device's rows attend to its own fresh rows and everybody else's stale ones."""
    forward = layer.forward
    last: list[torch.Tensor] = []

    def displaced(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        stale = x if state.fresh or not last else last[0]
        last[:] = [x]
        if stale is x:
            return forward(x, *args, **kwargs)
        outs = []
        for p in range(state.patches):
            seen = stale.clone()
            mine = _rows(x, p, state.patches, 1)
            _rows(seen, p, state.patches, 1).copy_(mine)
            out = F.scaled_dot_product_attention(
                *(
                    v.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
                    for v in (layer.to_q(mine), layer.to_k(seen), layer.to_v(seen))
                )
            )
            outs.append(layer.to_out[1](layer.to_out[0](out.transpose(1, 2).flatten(2))))
        return torch.cat(outs, dim=1)

    return displaced


_LAYERS: dict[type, Callable[[Any, _State], Callable[..., torch.Tensor]]] = {
    nn.Conv2d: _convolution,
    nn.GroupNorm: _group_norm,
}
