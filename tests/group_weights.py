"""What processes of a group hold of a denoiser whose weights are in a checkpoint."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from group import Member
from group_failures import SPLIT, loop
from safetensors.torch import save_model
from torch import nn
from toys import Toy, toy, toy_call

from asyncdiff import AsyncDenoiser


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
