"""Which dimensions of a node's inputs are dimensions of its output.

Dimension i of an input *flows* to dimension o of the output where output[…, k, …] along o needs
input[…, k, …] along i only: then a share of the one gives that share of the other. Operations that
are not known let nothing flow.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from torch import fx

from .nodes import argument, is_tensor, named, operation, shape_of, wrapped

#: For an input, by its dimensions: of the output, or None.
Dims = list[int | None]
#: By input; None where nothing but its dtype counts.
Flow = dict[fx.Node, Dims | None]


def flow_of(node: fx.Node) -> Flow:
    """The dimensions of each tensor that a node takes; empty for an operation that is not known."""
    rule = _RULES.get(operation(node))
    return {} if rule is None else rule(node)


def _pointwise(node: fx.Node) -> Flow:
    out = shape_of(node)
    flow: Flow = {}
    for source in filter(is_tensor, node.all_input_nodes):
        shape = shape_of(source)
        before = len(out) - len(shape)
        flow[source] = [
            d + before if size == out[d + before] else None for d, size in enumerate(shape)
        ]
    return flow


def _first(*lost: Callable[[fx.Node, int], Sequence[int]]) -> Callable[[fx.Node], Flow]:
    """The first input's dimensions are the output's, but for those that are ``lost``."""

    def rule(node: fx.Node) -> Flow:
        (source, dims) = (node.args[0], len(shape_of(node.args[0])))  # type: ignore[arg-type]
        gone = {wrapped(d, dims) for each in lost for d in each(node, dims)}
        assert isinstance(source, fx.Node)
        return {source: [None if d in gone else d for d in range(dims)]}

    return rule


def _last(_: fx.Node, __: int) -> Sequence[int]:
    return (-1,)


def _normalized(node: fx.Node, _: int) -> Sequence[int]:
    return range(-len(node.args[1]), 0)  # type: ignore[arg-type]


def _dim(place: int, default: int | None = None) -> Callable[[fx.Node, int], Sequence[int]]:
    def lost(node: fx.Node, _: int) -> Sequence[int]:
        return (int(argument(node, place, "dim", default)),)

    return lost


def _reduced(node: fx.Node) -> Flow:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dims = len(shape_of(source))
    over = named(node, "dim")
    over = [over] if isinstance(over, int) else over or range(dims)  # none given: all
    gone = {wrapped(int(d), dims) for d in over}
    if named(node, "keepdim"):
        return {source: [None if d in gone else d for d in range(dims)]}
    left = itertools.count()
    return {source: [None if d in gone else next(left) for d in range(dims)]}


def _permuted(node: fx.Node) -> Flow:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dims = len(shape_of(source))
    order = [wrapped(int(d), dims) for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    return {source: [order.index(d) for d in range(dims)]}


def _transposed(node: fx.Node) -> Flow:
    source, a, b = node.args
    assert isinstance(source, fx.Node)
    dims = len(shape_of(source))
    to: Dims = list(range(dims))
    a, b = wrapped(int(a), dims), wrapped(int(b), dims)  # type: ignore[arg-type]
    to[a], to[b] = b, a
    return {source: to}


def _reshaped(node: fx.Node) -> Flow:
    """Of a view those dimensions that are the same before and after, with as much before them."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    out = _strides(shape_of(node))
    return {source: [out.get(key) for key in _strides(shape_of(source))]}


def _alike(node: fx.Node) -> Flow:
    """Views that may have the sizes of before: view_as, and one as another dtype, whose elements
    are as large then."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return _pointwise(node) if shape_of(source) == shape_of(node) else {}


def _strides(shape: Sequence[int]) -> dict[tuple[int, int, int], int]:
    """Dimensions by how much is before them, how long they are, and how many of that there were."""
    found: dict[tuple[int, int, int], int] = {}
    before = 1
    for d, size in enumerate(shape):
        count = 0
        while (before, size, count) in found:
            count += 1
        found[before, size, count] = d
        before *= size
    return found


def _unsqueezed(node: fx.Node) -> Flow:
    source, dim = node.args
    assert isinstance(source, fx.Node)
    dims = len(shape_of(source))
    new = wrapped(int(dim), dims + 1)  # type: ignore[arg-type]
    return {source: [d + (d >= new) for d in range(dims)]}


def _squeezed(node: fx.Node) -> Flow:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape = shape_of(source)
    given = argument(node, 1, "dim", range(len(shape)))
    which = {wrapped(int(d), len(shape)) for d in ([given] if isinstance(given, int) else given)}
    gone = {d for d in which if shape[d] == 1}
    left = itertools.count()
    return {source: [None if d in gone else next(left) for d in range(len(shape))]}


def _cast(node: fx.Node) -> Flow:
    """type_as, to: the second input's dtype."""
    source, like = node.args[:2]
    assert isinstance(source, fx.Node) and isinstance(like, fx.Node)
    return {like: None, source: list(range(len(shape_of(source))))}


def _stacked(node: fx.Node) -> Flow:
    new = wrapped(int(argument(node, 1, "dim", 0)), len(shape_of(node)))
    return {
        source: [d + (d >= new) for d in range(len(shape_of(source)))]
        for source in node.all_input_nodes
    }


def _without(place: int) -> Callable[[fx.Node], Flow]:
    """A dimension is gone, the others are there (unbind, select)."""

    def rule(node: fx.Node) -> Flow:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        dims = len(shape_of(source))
        gone = wrapped(int(argument(node, place, "dim", 0)), dims)
        return {source: [None if d == gone else d - (d > gone) for d in range(dims)]}

    return rule


def _sliced(node: fx.Node) -> Flow:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dims = len(shape_of(source))
    whole = shape_of(source) == shape_of(node)
    gone = wrapped(int(argument(node, 1, "dim", 0)), dims)
    return {source: [None if d == gone and not whole else d for d in range(dims)]}


def _scattered(node: fx.Node) -> Flow:
    """slice_scatter: both inputs, but for the dimension that is written to in part."""
    into, source = node.args[:2]
    assert isinstance(into, fx.Node) and isinstance(source, fx.Node)
    dims = len(shape_of(into))
    gone = wrapped(int(argument(node, 2, "dim", 0)), dims)
    to: Dims = [None if d == gone else d for d in range(dims)]
    return {into: to, source: list(to)}


def _concatenated(node: fx.Node) -> Flow:
    dims = len(shape_of(node))
    gone = wrapped(int(argument(node, 1, "dim", 0)), dims)
    if any(len(shape_of(source)) != dims for source in node.all_input_nodes):
        return {}  # torch lets empty ones have one dimension
    to: Dims = [None if d == gone else d for d in range(dims)]
    return {source: list(to) for source in node.all_input_nodes}


def _multiplied(node: fx.Node) -> Flow:
    """matmul: rows are the first's, columns the second's, batches both's."""
    first, second = node.args[:2]
    assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
    out, a, b = len(shape_of(node)), shape_of(first), shape_of(second)
    if len(a) < 2 or len(b) < 2:
        return {}
    batches: dict[fx.Node, Dims] = {}
    for source, shape in ((first, a), (second, b)):
        before = out - len(shape)
        same = [shape[d] == shape_of(node)[d + before] for d in range(len(shape) - 2)]
        batches[source] = [d + before if s else None for d, s in enumerate(same)] + [None, None]
    if first is not second:  # else each of its rows meets each of its columns
        batches[first][-2] = out - 2
        batches[second][-1] = out - 1
    return {**batches}


def _added(node: fx.Node) -> Flow:
    """addmm: what is added is broadcast over rows, or has them, too."""
    added, first, second = node.args[:3]
    assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
    assert isinstance(added, fx.Node)
    if len({added, first, second}) < 3:
        return {}
    return {added: _pointwise(node)[added], first: [0, None], second: [None, 1]}


def _scaled(node: fx.Node) -> Flow:
    """_scaled_mm: rows have a scale each, or share one; columns, too."""
    flow = _multiplied(node)
    for place, name, dim in ((2, "scale_a", 0), (3, "scale_b", 1), (4, "bias", 1)):
        source = argument(node, place, name)
        if not isinstance(source, fx.Node):
            continue
        added = 2 - len(shape_of(source))
        shape = (*[1] * added, *shape_of(source))
        whole = [size if d == dim else 1 for d, size in enumerate(shape_of(node))]
        each = [d if d == dim and size > 1 else None for d, size in enumerate(shape)][added:]
        # Of scales of blocks of other forms, and of a factor that is a scale, nothing is known.
        other = added < 0 or not all(map(_one_or, shape, whole))
        if other or (flow.setdefault(source, each) is not each and flow[source] != each):
            return {}
    return flow


def _by_blocks(place: int) -> Callable[[fx.Node], Flow]:
    """What quantises by blocks of values, of these sizes: along dimensions where they have one."""

    def rule(node: fx.Node) -> Flow:
        blocks, out = node.args[place], shape_of(node)
        assert isinstance(blocks, (list, tuple))
        sources = [s for s in node.all_input_nodes if is_tensor(s)]
        if any(len(shape_of(s)) != len(out) for s in sources):
            return {}
        return {
            source: [
                d if blocks[d] == 1 and size == out[d] else None
                for d, size in enumerate(shape_of(source))
            ]
            for source in sources
        }

    return rule


def _of_scales(node: fx.Node) -> Flow:
    """Casts with scales, of which there is one for all along a dimension, or one for each."""
    out = shape_of(node)
    sources = [s for s in node.all_input_nodes if is_tensor(s)]
    alike = all(
        len(shape_of(s)) == len(out) and all(map(_one_or, shape_of(s), out)) for s in sources
    )
    return _pointwise(node) if alike else {}


def _one_or(size: int, other: int) -> bool:
    return size in (1, other)


def _element(node: fx.Node) -> Flow:
    """One of several values; of a tensor what is at an index of its first dimension."""
    source, index = node.args
    assert isinstance(source, fx.Node)
    dims = len(shape_of(source))
    if isinstance(source.meta["val"], (list, tuple)):
        return {source: list(range(dims))}
    return {source: [None, *range(dims - 1)]} if isinstance(index, int) else {}


#: Operations on each element by itself.
ANY_SHAPE = (
    *("add", "sub", "mul", "div", "neg", "pow", "exp", "log", "sqrt", "rsqrt", "reciprocal", "abs"),
    *("sin", "cos", "tanh", "sigmoid", "silu", "gelu", "relu", "leaky_relu", "elu", "softplus"),
    *("erf", "clip", "clamp", "clamp_min", "clamp_max", "where", "maximum", "minimum", "lerp"),
    *(
        "square",
        "hardtanh",
        "mish",
        "logical_not",
        "logical_and",
        "logical_or",
        "bitwise_not",
        "eq",
        "ne",
    ),
    *("lt", "le", "gt", "ge", "addcmul", "nan_to_num", "masked_fill", "rsub", "sign", "round"),
    *("floor", "ceil", "to", "_to_copy", "dropout", "clone", "contiguous", "alias"),
    *("detach", "empty_like", "zeros_like", "ones_like", "full_like", "lift_fresh_copy"),
    *("expand_as", "isnan", "__and__", "__or__", "bitwise_and", "bitwise_or", "copy"),
)
_RULES: dict[str, Callable[[fx.Node], Flow]] = {
    **dict.fromkeys(ANY_SHAPE, _pointwise),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten"), _reshaped),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "prod", "var", "std"), _reduced),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax"), _first(_dim(1, -1))),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _first(_dim(2, 0))),
    **dict.fromkeys(("layer_norm", "rms_norm"), _first(_normalized)),
    **dict.fromkeys(("linear", "view_as_complex"), _first(_last)),
    "glu": _first(_dim(1, -1)),
    "view_as": _alike,
    "view.dtype": _alike,
    "view_as_real": _first(),
    "permute": _permuted,
    "transpose": _transposed,
    "unsqueeze": _unsqueezed,
    "squeeze": _squeezed,
    "expand": _pointwise,
    "type_as": _cast,
    "to.other": _cast,
    "stack": _stacked,
    "unbind": _without(1),
    "select": _without(1),
    "slice": _sliced,
    "slice_scatter": _scattered,
    "cat": _concatenated,
    "matmul": _multiplied,
    "bmm": _multiplied,
    "mm": _multiplied,
    "_int_mm": _multiplied,
    "addmm": _added,
    "_scaled_mm": _scaled,
    "choose_qparams_affine": _by_blocks(2),
    "choose_scale_float8": _by_blocks(1),
    "quantize_affine": _by_blocks(1),
    "dequantize_affine": _by_blocks(1),
    "quantize_affine_float8_non_decomposed": _of_scales,
    "dequantize_affine_float8_non_decomposed": _of_scales,
    "getitem": _element,
}
