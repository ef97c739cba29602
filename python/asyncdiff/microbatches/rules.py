"""What is done to a batch part by part: operations that treat samples alike.

A rule is given an operation and its arguments; it returns the result in parts, or NotImplemented
where these arguments take samples together: the parts are then joined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .tensor import RULES, Layout, MicroBatched, made, on_stream, written
from .views import Views

aten = torch.ops.aten


def _by_parts(
    layout: Layout,
    parts_of: Callable[[int], tuple[Sequence[Any], dict[str, Any]]],
    func: Any,
    plain: Sequence[torch.Tensor],
) -> list[Any]:
    """``func`` for each micro-batch on its stream, which waits for the ``plain`` tensors."""
    out = []
    for index, stream in enumerate(layout.streams):
        with on_stream(stream, plain):
            args, kwargs = parts_of(index)
            out.append(func(*args, **kwargs))
    return out


def _pointwise(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Samples do not know of each other: each micro-batch by itself."""
    given, spec = pytree.tree_flatten((args, kwargs))
    mine = [x for x in given if isinstance(x, MicroBatched)]
    if any(x.parts is None for x in mine):
        return NotImplemented
    layout, dims = mine[0].cut, mine[0].dim()
    if any(x.cut != layout or x.dim() != dims for x in mine):
        return NotImplemented
    rows = mine[0].shape[0]
    plain = [x for x in given if isinstance(x, torch.Tensor) and not isinstance(x, MicroBatched)]
    # What has more dimensions, or of all rows less than one and not one, is no case of ours.
    if any(x.shape[0] != rows for x in mine) or any(
        x.dim() > dims or (x.dim() == dims and x.shape[0] not in (1, rows)) for x in plain
    ):
        return NotImplemented
    writes = written(func, args, kwargs)
    for target in writes:
        if not isinstance(target, MicroBatched):
            return NotImplemented

    def parts_of(index: int) -> tuple[Sequence[Any], dict[str, Any]]:
        leaves = []
        for x in given:
            if isinstance(x, MicroBatched):
                assert x.parts is not None
                x = x.parts[index]
            elif isinstance(x, torch.Tensor) and x.dim() == dims and x.shape[0] == rows != 1:
                x = layout.part(x, index)
            leaves.append(x)
        result: tuple[Sequence[Any], dict[str, Any]] = pytree.tree_unflatten(leaves, spec)
        return result

    out = _by_parts(layout, parts_of, func, plain)
    if writes:
        return writes[0]
    if isinstance(out[0], (bool, int, float)):  # a comparison of whole tensors, for one
        return NotImplemented
    return _collected(layout, out, Views())


def _collected(layout: Layout, out: Sequence[Any], views: Views) -> Any:
    """Results of all micro-batches as one: tensors, or tuples and lists of tensors."""
    if isinstance(out[0], (tuple, list)):
        parts = zip(*out, strict=True)
        return type(out[0])(_collected(layout, p, views) for p in parts)
    return made(layout, list(out), views)


def _one(conditions: Callable[..., int | None], views: bool = False) -> Callable[..., Any]:
    """The rule of an operation on one tensor, whose result has so many ``conditions`` (None: it
    does not go by parts). ``views``: it shares memory with what it is made of."""

    def rule(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        x = args[0]
        if not isinstance(x, MicroBatched) or x.parts is None:
            return NotImplemented
        if any(isinstance(a, MicroBatched) for a in pytree.tree_leaves((args[1:], kwargs))):
            return NotImplemented
        layout, parts = x.cut, x.parts
        now = conditions(x, *args[1:], **kwargs)
        if now is None:
            return NotImplemented
        rest = _PART_ARGUMENTS.get(func.overloadpacket, lambda x, *rest: rest)(x, *args[1:])
        out = _by_parts(layout, lambda i: ((parts[i], *rest), kwargs), func, ())
        return _collected(layout.of(now), out, x.views if views else Views())

    return rule


def _dims(x: MicroBatched, dim: Any) -> list[int]:
    every = range(x.dim()) if dim is None else dim if isinstance(dim, (list, tuple)) else [dim]
    return [d % max(x.dim(), 1) for d in every]


def _unless_first(x: MicroBatched, dim: Any = None, *_: Any, **__: Any) -> int | None:
    """Rows stay apart where nothing happens along the first dimension."""
    dims = _dims(x, dim)
    return None if 0 in dims or not dims else x.cut.conditions


def _slice(
    x: MicroBatched, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> int | None:
    whole = start in (None, 0) and (end is None or end >= x.shape[dim]) and step == 1
    return x.cut.conditions if dim % x.dim() != 0 or whole else None


def _always(x: MicroBatched, *_: Any, **__: Any) -> int | None:
    return x.cut.conditions


def _to(x: MicroBatched, *_: Any, device: Any = None, **__: Any) -> int | None:
    elsewhere = device is not None and torch.device(device).type != x.device.type
    return None if elsewhere else x.cut.conditions


def _shaped(x: MicroBatched, shape: Sequence[int], *_: Any, **__: Any) -> int | None:
    """A view with the rows where they were."""
    if isinstance(shape, torch.dtype):
        return None
    keeps = len(shape) > 0 and shape[0] == x.shape[0] and x.dim() > 0
    return x.cut.conditions if keeps else None


def _unsqueezed(x: MicroBatched, dim: int) -> int | None:
    return None if dim % (x.dim() + 1) == 0 else x.cut.conditions


def _permuted(x: MicroBatched, dims: Sequence[int]) -> int | None:
    return x.cut.conditions if dims[0] % x.dim() == 0 else None


def _transposed(x: MicroBatched, a: int, b: int) -> int | None:
    return None if 0 in (a % x.dim(), b % x.dim()) else x.cut.conditions


def _shape_of_part(x: MicroBatched, shape: Sequence[int], *rest: Any) -> tuple[Any, ...]:
    return ([shape[0] // x.cut.count, *shape[1:]], *rest)


def _pieces(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Split along the first dimension, where that separates conditions; along another as it is."""
    x, size = args[0], args[1]
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    if not isinstance(x, MicroBatched) or x.parts is None:
        return NotImplemented
    layout, parts = x.cut, x.parts
    if dim % x.dim() != 0:
        out = _by_parts(layout, lambda i: ((parts[i], size, dim), {}), func, ())
        return _collected(layout, out, x.views)
    each = x.shape[0] // layout.conditions
    if isinstance(size, (list, tuple)):
        sizes = list(size)
    else:
        sizes = [size] * (x.shape[0] // size) if size and x.shape[0] % size == 0 else []
    if not sizes or any(s % each or s == 0 for s in sizes):
        return NotImplemented
    split = [s // layout.count for s in sizes]
    pieces = _by_parts(layout, lambda i: ((parts[i], split), {}), torch.split, ())
    return [
        made(layout.of(s // each), list(piece), x.views)
        for s, piece in zip(sizes, zip(*pieces, strict=True), strict=True)
    ]


def _cat(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Batches one after another: further conditions; along another dimension part by part."""
    tensors = list(args[0])
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    mine = [x for x in tensors if isinstance(x, MicroBatched)]
    layout, dims = mine[0].cut, mine[0].dim()
    along = dim % dims
    if any(x.parts is None or x.dim() != dims for x in mine):
        return NotImplemented
    if along == 0:
        each = mine[0].shape[0] // layout.conditions
        alike = [
            isinstance(x, MicroBatched)
            and x.cut.streams == layout.streams
            and x.shape[0] == each * x.cut.conditions
            for x in tensors
        ]
        if not all(alike):
            return NotImplemented
        now = layout.of(sum(x.cut.conditions for x in mine))
    else:
        now = layout
        if any(x.dim() != dims or x.shape[0] != mine[0].shape[0] for x in tensors):
            return NotImplemented
        if any(x.cut != layout for x in mine):
            return NotImplemented
    plain = [x for x in tensors if not isinstance(x, MicroBatched)]

    def parts_of(index: int) -> tuple[Sequence[Any], dict[str, Any]]:
        parts = [
            x.parts[index] if isinstance(x, MicroBatched) and x.parts else layout.part(x, index)
            for x in tensors
        ]
        return (parts, dim), {}

    return _collected(now, _by_parts(layout, parts_of, func, plain), Views())


def _stack(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Along a new dimension that is not the first."""
    tensors = list(args[0])
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    first = tensors[0]
    if dim == 0 or not all(
        isinstance(x, MicroBatched)
        and x.parts is not None
        and x.cut == first.cut
        and dim % (x.dim() + 1) != 0
        for x in tensors
    ):
        return NotImplemented
    layout = first.cut
    out = _by_parts(layout, lambda i: (([x.parts[i] for x in tensors], dim), {}), func, ())
    return _collected(layout, out, Views())


def _like(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A new tensor that only looks at another one's shape, dtype and device."""
    x = args[0]
    alike = torch.empty((), dtype=x.dtype, device=x.device).expand(x.shape)
    return func(alike, *args[1:], **kwargs)


_VIEWS = (aten.view, aten._unsafe_view, aten.expand)
_NEW = (
    *(aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like),
    *(aten.rand_like, aten.randn_like),
    *(aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full),
)
_REDUCTIONS = (aten.mean, aten.sum, aten.std, aten.var, aten.amax, aten.amin)
#: What of the arguments is another one for a part.
_PART_ARGUMENTS: dict[Any, Callable[..., tuple[Any, ...]]] = dict.fromkeys(_VIEWS, _shape_of_part)
_BY_OPERATION: dict[Any, Callable[..., Any]] = {
    "pointwise": _pointwise,
    aten.cat: _cat,
    aten.stack: _stack,
    aten.copy_: _pointwise,
    aten.fill_: _pointwise,
    aten.zero_: _pointwise,
    aten.split: _pieces,
    aten.split_with_sizes: _pieces,
    aten.slice: _one(_slice, views=True),
    **dict.fromkeys(_VIEWS, _one(_shaped, views=True)),
    aten.unsqueeze: _one(_unsqueezed, views=True),
    aten.permute: _one(_permuted, views=True),
    aten.transpose: _one(_transposed, views=True),
    aten.select: _one(_unless_first, views=True),
    aten.detach: _one(_always, views=True),
    aten.alias: _one(_always, views=True),
    aten.clone: _one(_always),
    aten._to_copy: _one(_to),
    **dict.fromkeys(_NEW, _like),
    **dict.fromkeys(_REDUCTIONS, _one(_unless_first)),
}
RULES.update(_BY_OPERATION)
