"""Mailbox memory as tensors: the layout of a bundle and views of its slots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

import asyncdiff_core as core


def as_laid_out(value: torch.Tensor, spec: core.TensorSpec) -> torch.Tensor:
    """``value`` with the strides of ``spec``: itself, or a copy. Strides of dimensions of size 1,
    and of empty tensors, mean nothing."""
    strides = value.stride()
    if strides == spec.strides or value.numel() == 0:
        return value
    pairs = zip(value.shape, strides, spec.strides, strict=True)
    if all(size == 1 or mine == due for size, mine, due in pairs):
        return value
    out = torch.empty_strided(spec.shape, spec.strides, dtype=value.dtype, device=value.device)
    return out.copy_(value)


def layout_of(values: Sequence[torch.Tensor]) -> core.Layout:
    """The layout of a bundle of tensors like ``values``, with their dense strides."""
    specs = []
    for value in values:
        strides = torch.empty_like(value).stride()  # dense, and the same order of dimensions
        name = str(value.dtype).removeprefix("torch.")
        specs.append(core.TensorSpec(name, tuple(value.shape), tuple(strides)))
    return core.Layout(specs)


def memory_of(buffer: core.Buffer, device: torch.device) -> torch.Tensor:
    """A slot as flat uint8, without copying."""
    if device.type == "cuda":
        return torch.as_tensor(buffer, device=device)
    return torch.from_numpy(np.asarray(buffer))


def tensors_in(memory: torch.Tensor, layout: core.Layout) -> list[torch.Tensor]:
    """The tensors of a bundle that lies in ``memory`` (flat uint8), without copying."""
    out = []
    for spec, offset in zip(layout.specs, layout.offsets, strict=True):
        dtype = getattr(torch, spec.dtype)
        part = memory[offset : offset + spec.nbytes].view(dtype)
        out.append(part.as_strided(spec.shape, spec.strides))
    return out


def moved_on(
    new: Sequence[torch.Tensor], old: Sequence[torch.Tensor], share: float
) -> list[torch.Tensor]:
    """``share`` of the change between two bundles of a channel, added to the newer one."""
    return [
        torch.lerp(b, a, 1 + share) if a.is_floating_point() else a
        for a, b in zip(new, old, strict=True)
    ]
