"""Shares of two ranks put together where one of them arrives: in a mailbox that has room for both.

That saves a copy of all keys and values at every meeting, and only works where a share is one
stretch of memory (tokens are the outermost dimension, as with one picture), and where what was put
together is used no more at the next meeting, since the mailbox then goes back to its sender.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import torch
from torch import fx

import asyncdiff_core as core

from ...graph.capture import VIEW
from ...graph.program import joined


def brief_meetings(graphs: Sequence[fx.Graph]) -> dict[int, list[int]]:
    """The meetings whose values are used before the next one only, in the program of every rank,
    with the dimension along which each of them is put together."""
    first, *others = map(_brief_in, graphs)
    return {n: dims for n, dims in first.items() if all(one.get(n) == dims for one in others)}


def _brief_in(graph: fx.Graph) -> dict[int, list[int]]:
    position = {node: i for i, node in enumerate(graph.nodes)}
    by_number: dict[int, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_module", target="meet"):
        by_number.setdefault(int(node.args[0]), []).append(node)
    ends = {number - 1: position[nodes[0]] for number, nodes in by_number.items()}
    found = {}
    for number, nodes in by_number.items():
        end = ends.get(number, position[graph.output_node()])
        if all(position[user] < end for node in nodes for user in _users(node)):
            found[number] = [int(node.args[3]) for node in nodes]  # type: ignore[arg-type]
    return found


def _users(node: fx.Node) -> Iterator[fx.Node]:
    """What uses a value, or a view of it."""
    for user in node.users:
        yield user
        if VIEW in user.meta or user.target is operator.getitem or _may_share(user.target):
            yield from _users(user)


def _may_share(target: object) -> bool:
    """Whether what an operation returns may lie in its input's memory."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return any(result.alias_info is not None for result in target._schema.returns)


def in_one(layouts: Sequence[core.Layout], dims: Sequence[int]) -> core.Layout | None:
    """A layout in which the ranks' shares of each value follow on each other, along these
    dimensions, without gaps; None where they would not be one tensor."""
    together: list[core.TensorSpec] = []
    for shares, dim in zip(zip(*(x.specs for x in layouts), strict=True), dims, strict=True):
        if not all(_outermost(share, dim) for share in shares):
            return None
        if len({_beside(share, dim) for share in shares}) > 1:
            return None
        together += shares
    made = core.Layout(together)
    count = len(layouts)
    for i, spec in enumerate(together):
        if (i + 1) % count and made.offsets[i + 1] != made.offsets[i] + spec.nbytes:
            return None
    return made


def _outermost(spec: core.TensorSpec, dim: int) -> bool:
    inner = [
        s
        for d, (n, s) in enumerate(zip(spec.shape, spec.strides, strict=True))
        if d != dim and n > 1
    ]
    return all(stride < spec.strides[dim] for stride in inner)


def _beside(spec: core.TensorSpec, dim: int) -> tuple[object, ...]:
    """What shares of one value have alike."""
    sizes = tuple(n for d, n in enumerate(spec.shape) if d != dim)
    strides = tuple(s for n, s in zip(spec.shape, spec.strides, strict=True) if n > 1)
    return spec.dtype, sizes, strides


def whole_in(
    memory: torch.Tensor, layout: core.Layout, index: int, dim: int, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``index``-th value in ``memory`` (flat uint8) that is laid out for two ranks' shares, as
    one tensor, without copying; and the share of ``rank`` in it."""
    first = 2 * index
    shares = layout.specs[first : first + 2]
    dtype = getattr(torch, shares[0].dtype)
    parts = [torch.empty_strided(s.shape, s.strides, dtype=dtype, device="meta") for s in shares]
    like = joined(parts, dim, parts[0])
    begin = layout.offsets[first]
    flat = memory[begin : begin + sum(s.nbytes for s in shares)].view(dtype)
    whole = flat.as_strided(like.shape, like.stride(), flat.storage_offset())
    before = sum(s.shape[dim] for s in shares[:rank])
    return whole, whole.narrow(dim, before, shares[rank].shape[dim])
