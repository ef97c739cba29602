"""A group of processes whose cards are of two kinds."""

from __future__ import annotations

import os
from typing import Any

import torch
from group import Member
from toys import Toy, toy_call

from asyncdiff import AsyncDenoiser
from asyncdiff.graph.capture import Captured
from asyncdiff.partition.cost import Costs
from asyncdiff.runtime import devices
from asyncdiff.runtime.cutting import profiler


def unequal(member: Member) -> Any:
    """What each process measured, the cuts and speeds, made twice; process 1's card takes 2 ms for
    a node and the others' 1."""
    os.environ["ASYNCDIFF_CACHE"] = str(member.folder.parent / "kept")
    measured = 0
    kind = "slow" if member.process == 1 else "fast"

    def times(profiler: Any, captured: Captured, *_: Any) -> Costs:
        nonlocal measured
        measured += 1
        ms = {n: 0.0 if n in captured.views else 1.0 + (kind == "slow") for n in captured.nodes}
        return Costs(ms, dict.fromkeys(captured.nodes, 0), f"measured on a {kind} one")

    devices.kind_of = lambda device: kind
    profiler.Profiler._measured = times  # type: ignore[method-assign]
    torch.manual_seed(0)
    module = Toy(depth=20).double().eval().requires_grad_(False)
    out: list[Any] = []
    for name in ("first", "second"):
        group = member.group(name)
        where = {"group": group, "devices": ["cpu"], "components": 3, "deadline": 60}
        denoiser = AsyncDenoiser(module, (), toy_call(), **where)
        out.append([denoiser.partition.cuts, denoiser.partition.speeds])
        denoiser.close()
    return [measured, *out]
