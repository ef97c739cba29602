"""What processes of a group hold of a denoiser whose weights are in a checkpoint."""

from __future__ import annotations

import ctypes
import gc
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from group import Member
from group_failures import SPLIT, loop
from safetensors.torch import save_file, save_model
from tiny_pipelines import draw as picture
from tiny_pipelines import tiny_flux
from torch import nn
from toys import Toy, toy, toy_call

import asyncdiff
from asyncdiff import AsyncDenoiser
from asyncdiff.graph.weights import Weights


class Large(nn.Module):
    """Layers of 4 MiB each, and as little else as possible."""

    def __init__(self, layers: int, width: int = 1024) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        h = sample + timestep / 1000
        for layer in self.layers:
            h = torch.tanh(layer(h))
        return (h,)


def on_meta(make: Any, *args: Any) -> Any:
    with torch.device("meta"):
        return make(*args).eval().requires_grad_(False)


def draw(denoiser: AsyncDenoiser) -> None:
    sample = torch.ones(1, 1024)
    with denoiser.generation(torch.tensor([900.0, 600.0, 300.0])):
        for t in (900.0, 600.0, 300.0):
            (sample,) = denoiser(sample, torch.tensor(t))


def _of_status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def memory(member: Member) -> dict[str, int]:
    """Bytes of a component, and by how much this process grew at most while it was loaded."""
    group, layers = member.group(), int(member.option)
    folder = member.folder.parent
    # What exporting and computing take by themselves.
    small = AsyncDenoiser(Large(2).eval(), group=group, split="estimate", deadline=60)
    draw(small)
    small.close()
    gc.collect()
    if member.process == 0:
        with torch.no_grad():
            save_model(Large(layers), str(folder / "large.safetensors"))
        gc.collect()
    torch.distributed.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _of_status("VmRSS")
    denoiser = AsyncDenoiser(
        on_meta(Large, layers),
        group=group,
        checkpoint=folder / "large.safetensors",
        split="estimate",
        deadline=60,
    )
    draw(denoiser)
    grown = _of_status("VmHWM") - before
    weights = denoiser.partition.components[member.process].weights
    denoiser.close()
    return {"component": len(weights) * 4 * 2**20, "grown": grown}


def _flux(blocks: int, width: int) -> Any:
    """A FLUX transformer of so many blocks of each kind, ``width`` values a token."""
    return diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=blocks,
        num_single_layers=blocks,
        attention_head_dim=64,
        num_attention_heads=width // 64,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        axes_dims_rope=(16, 24, 24),
    )


def flux_pipeline(transformer: Any) -> tuple[Any, dict[str, Any]]:
    """A pipeline with this transformer, and a call of it."""
    pipe, call = tiny_flux()
    pipe.register_modules(transformer=transformer)
    return pipe, call | {"num_inference_steps": 3}


def saved_flux(folder: Path, blocks: int, width: int, dtype: torch.dtype = torch.float32) -> Any:
    """A FLUX transformer on the meta device, whose weights were written to this folder."""
    meta = on_meta(_flux, blocks, width)
    nn.Module.to(meta, dtype)
    index = {}
    for i, (name, weight) in enumerate(meta.state_dict().items()):
        save_file(
            {name: (0.02 * torch.randn(weight.shape)).to(dtype)}, folder / f"m-{i}.safetensors"
        )
        index[name] = f"m-{i}.safetensors"
    (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return meta


def drop_in(member: Member) -> dict[str, Any]:
    """In one process with two devices, through ``parallelize``: bytes of the components, and by how
    much the process grew at most while a FLUX was read from its checkpoint and a picture drawn."""
    split, folder = member.option or "auto", member.folder
    settings: dict[str, Any] = {"devices": ["cpu"] * 2, "components": 2, "warmup": 2}
    pipe, call = flux_pipeline(_flux(1, 64).eval())
    with asyncdiff.parallelize(pipe, split=split, **settings):  # what exporting takes by itself
        picture(pipe, call)
    del pipe
    meta = saved_flux(folder, 3, 1024)
    pipe, call = flux_pipeline(meta)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would not show when it is used again
    Path("/proc/self/clear_refs").write_text("5")
    before = _of_status("VmRSS")
    with asyncdiff.parallelize(pipe, split=split, checkpoint=folder, **settings) as handle:
        out = picture(pipe, call)
        grown = _of_status("VmHWM") - before
        uses = handle.partition.memory()
        (cpu,) = handle.report().memory
    return {
        "components": [use.weights for use in uses],
        "whole": sum(w.nbytes for w in meta.parameters()),
        "estimated": cpu["estimated_bytes"],
        "grown": grown,
        "finite": bool(torch.isfinite(out).all()),
        "meta": all(w.device.type == "meta" for w in meta.parameters()),
    }


def bits(member: Member) -> dict[str, Any]:
    """What is drawn from a checkpoint, by a module on the meta device and by one that is whole."""
    group, path = member.group(), member.folder / "toy.safetensors"
    if member.process == 0:
        save_model(toy(), str(path))
    torch.distributed.barrier()
    where: dict[str, Any] = {"group": group, "checkpoint": path, "deadline": 60}
    out: dict[str, Any] = {}
    whole = toy()
    for name, module in (("meta", on_meta(Toy).double()), ("whole", whole)):
        for split in ("auto", SPLIT):
            denoiser = AsyncDenoiser(module, split=split, **where)
            out[f"{name} {split}"] = loop(denoiser, toy_call())
            empty = all(w.device.type == "meta" for w in module.parameters())
            denoiser.close()
            out[f"{name} {split} empty"] = empty
    out["restored"] = all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), toy().parameters(), strict=True)
    )
    out["shared"] = whole.down[-1].weight is whole.down[0].weight
    return out


def replaced(member: Member) -> list[float]:
    """A weight that one component has is another one, and then the first again, with calls of
    other sizes in between, of devices that have copies: how far off results are."""
    Weights._shared = staticmethod(lambda weight, device: False)  # type: ignore[method-assign]
    module, off = toy(), []
    denoiser = AsyncDenoiser(module, group=member.group(), split=SPLIT, deadline=60)
    first = module.mix.weight
    other = nn.Parameter(2 * first, requires_grad=False)
    for batch, weight in ((1, first), (2, other), (1, first), (2, other), (3, first)):
        module.mix.weight = weight
        call = toy_call(batch=batch)
        with denoiser.generation([900]):
            off.append(float((denoiser(**call)[0] - module(**call)[0]).abs().max()))
    denoiser.close()
    return off
