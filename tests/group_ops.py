"""What two processes do whose compiled code exchanges through operators of torch."""

from __future__ import annotations

from typing import Any

import torch
from group import Member

import asyncdiff_core as core
from asyncdiff import ops

SHAPE, SLOTS, ROUNDS = (4, 6), 2, 7


def exchange(member: Member) -> Any:
    """Each value goes to process 1, which doubles it, and back; bundles of an operator that came
    too early or was left out would be others, or none."""
    from torch._inductor.compile_fx import compile_fx  # torch's default backend

    me, other = member.process, 1 - member.process
    fabric = core.HostFabric.from_group(member.group(), deadline=60)
    layout = core.Layout([core.TensorSpec("float32", SHAPE), core.TensorSpec("float32", SHAPE[:1])])
    for sender in range(2):
        channel = fabric.channel(sender, [1 - sender], layout, slots=SLOTS)
        ops.register(f"from {sender}", channel)

    def give(x: torch.Tensor, slot: int) -> torch.Tensor:
        y = torch.sin(x)
        ops.put("from 0", [y.t().contiguous().t(), y.sum(1)], slot)  # of other strides
        z, sums = ops.get("from 1", 0, slot)
        ops.release("from 1", 0, slot)
        return z + sums[:, None] - y

    def take(scale: torch.Tensor, slot: int) -> torch.Tensor:
        y, sums = ops.get("from 0", 1, slot)
        doubled = scale * y
        ops.release("from 0", 1, slot)
        ops.put("from 1", [doubled, scale * sums], slot)
        return doubled

    count = 0

    def counted(graph: Any, inputs: Any) -> Any:
        nonlocal count
        count += 1
        return compile_fx(graph, inputs)

    work = torch.compile(give if me == 0 else take, fullgraph=True, backend=counted)
    wrong, counts = 0.0, []
    for n in range(ROUNDS):
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(n))
        got = work(x if me == 0 else torch.tensor(2.0), n % SLOTS)
        y = torch.sin(x)
        want = y + 2 * y.sum(1)[:, None] if me == 0 else 2 * y
        wrong = max(wrong, float((got - want).abs().max()))
        counts.append(count)
    for sender in range(2):
        ops.unregister(f"from {sender}")
    fabric.all_gather(b"%d" % other)
    fabric.close()
    return wrong, counts
