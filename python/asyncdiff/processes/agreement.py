"""What the processes of a group have to be given alike, as words that they compare."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from ..graph.capture import Captured
from ..graph.checkpoint import Checkpoint
from ..graph.layers.quantized import parts_of
from ..graph.signature import Call, Role
from ..graph.writes import bits, sample
from ..partition.partition import Partition
from .team import DIGEST

#: What computes: another version may compute otherwise.
_PACKAGES = ("asyncdiff", "torch", "diffusers")


def of_program(module: nn.Module, checkpoint: Checkpoint | None) -> dict[str, str]:
    """Versions of packages, and what the denoiser is made of; its weights are those of
    ``checkpoint``, if there is one."""
    weights = [*module.named_parameters(), *module.named_buffers()]
    shapes = [f"{name} {tuple(w.shape)} {w.dtype}" for name, w in weights]
    values = digest(_samples(w for _, w in weights))
    layers = [f"{name} {type(m).__name__}" for name, m in module.named_modules()]
    return {
        **{f"the version of {name}": _version(name) for name in _PACKAGES},
        "the denoiser's class": type(module).__name__,
        "the number of the denoiser's weights": str(len(weights)),
        "the denoiser's layers": digest(layers),
        "the shapes and dtypes of the denoiser's weights": digest(shapes),
        **({"the values of the denoiser's weights": values} if checkpoint is None else {}),
        "the checkpoint": "none" if checkpoint is None else digest(checkpoint.words()),
    }


def of_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings by name, but for where a process has its ranks."""
    return {f"the setting {n}": repr(v) for n, v in settings.items() if n != "devices"}


def of_generation(
    settings: Mapping[str, Any], timesteps: torch.Tensor, call: Call, latents: bool
) -> dict[str, str]:
    """What a generation is given: its settings, its timesteps, and its first call; the values of
    what changes from step to step only with ``latents``."""
    steps = {"the timesteps": digest([timesteps])}
    return {**of_settings(settings), **steps, **_of_call(call, latents)}


def _of_call(call: Call, latents: bool) -> dict[str, str]:
    """The inputs of a call: which, of what shapes, and their values."""
    inputs = call.signature.inputs
    return {
        "the arguments of the denoiser": ", ".join(x.name for x in inputs),
        **{f"the shape of {x.name}": f"{list(x.shape)} {x.dtype}" for x in inputs},
        **{f"the argument {name}": repr(value) for name, value in call.signature.constants},
        **{
            x.name: digest([t])
            for x, t in zip(inputs, call.tensors, strict=True)
            if latents or x.role is not Role.LATENTS
        },
    }


def of_captured(captured: Captured) -> dict[str, str]:
    """The graph of a denoiser, whose nodes are what a partition names."""
    return {"the exported denoiser": digest(f"{n.name} {n.target}" for n in captured.nodes)}


def of_partition(parts: Partition) -> dict[str, str]:
    """Which nodes each component has, and what crosses."""
    mine = [" ".join(n.name for n in c.nodes) for c in parts.components]
    crossing = [f"{e}: {' '.join(v.name for v in b.values)}" for e, b in parts.boundaries.items()]
    return {"the denoiser's partition": digest([*mine, *crossing])}


def digest(values: Iterable[str | torch.Tensor]) -> str:
    """A word that other values, of text or of tensors by their bits, do not have. On a GPU the host
    waits."""
    found = hashlib.blake2b(digest_size=12)
    for value in values:
        if isinstance(value, torch.Tensor):
            found.update(bits(value.contiguous()).cpu().numpy().data)
        else:
            found.update(value.encode())
        found.update(b"\0")
    return DIGEST + found.hexdigest()


def _samples(weights: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Bytes of a few elements of each weight, of one kind of device and dtype together."""
    found: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for weight in (part for whole in weights for part in parts_of(whole)):
        if weight.device.type != "meta" and weight.numel() > 0:
            found.setdefault((weight.device, weight.dtype), []).append(sample(weight))
    return [torch.cat(some) for some in found.values()]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
