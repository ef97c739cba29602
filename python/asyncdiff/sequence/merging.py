"""Views that put the tokens of a whole batch into one dimension, or part them again, as quantised
layers do around a product of matrices.

Along such a dimension each sample has its tokens in segments of its own, so a rank has its share of
each sample's, as before.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

from .axis import Axis

#: The operations, of those that are told the sizes of their result.
VIEWS = ("view", "reshape", "_unsafe_view")
#: Those that take matrices only.
PRODUCTS = ("mm", "addmm", "_int_mm", "_scaled_mm")


def across(axis: Axis, before: Sequence[int], after: Sequence[int]) -> Axis | None:
    """Where a view from a shape to another one has the tokens that ``axis`` has before it; None
    where a share of them is not the same share then."""
    dim = ending_alike(axis.dim, before, after)
    if dim is None:
        return None
    old, new = before[axis.dim], after[dim]
    if new >= old:
        times = new // old
        return Axis(dim, axis.segments * times)
    times = old // new
    segments = axis.segments[: len(axis.segments) // times]
    return Axis(dim, segments) if segments * times == axis.segments else None


def ending_alike(dim: int, before: Sequence[int], after: Sequence[int]) -> int | None:
    """The dimension after a view that ends where ``dim`` of before it does, and has it whole, or is
    a part of it; None if there is none."""
    mine, others = _bounds(before), _bounds(after)
    begin, end = mine[dim], mine[dim + 1]
    for d, size in enumerate(after):
        if others[d + 1] == end and size > 1:
            larger, smaller = (others, mine) if size < before[dim] else (mine, others)
            outer = begin if size < before[dim] else others[d]
            return d if outer in larger and smaller[-1] == larger[-1] else None
    return None


def _bounds(shape: Sequence[int]) -> list[int]:
    """How much is before each dimension, and all."""
    return list(itertools.accumulate(shape, operator.mul, initial=1))
