"""The sharding pass: which values of a denoiser's graph hold a share of the tokens on each rank.

It begins where tokens do: at what queries of attention are made of, as far back as their tokens can
be followed. From there on each node has its share of what it had, as long as its tokens do not
meet: whatever has no tokens is whole on every rank. At attention the keys and values of all ranks
are gathered, and its queries stay shared out. Where an operation is not known, or mixes tokens,
its inputs are gathered, and it is computed whole, on every rank; so the result is always right.
(Gathering keys and values before attention is what Megatron's context parallelism does for them;
no communication but that is needed, as in DeepSpeed-Ulysses between its exchanges of heads.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx

from ..graph.capture import Captured
from ..graph.signature import Role
from .axis import Axis, joined
from .flow import flow_of
from .merging import PRODUCTS, VIEWS, across, ending_alike
from .nodes import argument, is_tensor, operation, shape_of, wrapped


@dataclass(frozen=True)
class Keys:
    """All tokens, those of one rank after those of the other: for the keys of attention, whose
    order does not count."""

    axis: Axis


@dataclass(frozen=True)
class Mask:
    """Of a mask of attention the rows of own queries, with columns in the order of :class:`Keys`;
    None: all of them, or in their own order."""

    rows: Axis | None
    keys: Axis | None


#: How a node is given an input; None: whole, as it would be without ranks.
Form = Axis | Keys | Mask | None
#: Of a node's value, or of each of its values.
Axes = Axis | None | list[Axis | None]

ATTENTION = "scaled_dot_product_attention"
#: Operations on a part of a dimension, and where they are told which.
PARTING = {"slice": 1, "slice_scatter": 2, "split": 2, "split_with_sizes": 2, "chunk": 2}


@dataclass
class Sharding:
    """What the pass found.

    ``axes`` are those of the nodes whose values are shared out, ``entries`` the nodes that are
    computed whole and then shared out, ``forms`` how a node's inputs are given to it. ``attention``
    are the nodes at which keys and values are gathered, ``unknown`` those for which inputs are
    gathered because nothing is known of what they do to tokens.
    """

    axes: dict[fx.Node, Axes] = field(default_factory=dict)
    entries: set[fx.Node] = field(default_factory=set)
    forms: dict[fx.Node, dict[fx.Node, Form]] = field(default_factory=dict)
    attention: list[fx.Node] = field(default_factory=list)
    unknown: list[fx.Node] = field(default_factory=list)

    def axis(self, node: fx.Node) -> Axis | None:
        """The axis of a node with one value."""
        found = self.axes.get(node)
        return None if isinstance(found, list) else found

    def every_axis(self) -> set[Axis]:
        """All that there are."""
        each = (axes if isinstance(axes, list) else [axes] for axes in self.axes.values())
        return {axis for axes in each for axis in axes if axis is not None}

    def longest(self) -> Axis | None:
        """Of all attention the most tokens that are queries, which its work grows with; keys, where
        each rank has all queries. None where there is no attention."""
        each = [
            axis
            for node in self.attention
            if (axis := self.axis(node.args[0]) or self.axis(node.args[1]))  # type: ignore[arg-type]
        ]
        return max(each, key=lambda axis: axis.length, default=None)


def shard(captured: Captured) -> Sharding:
    """Follow the tokens through a denoiser's graph."""
    found = _followed(captured, merged=False)
    if not any(operation(n) in PRODUCTS for n in captured.nodes):
        return found
    # To whoever looks for where tokens begin, those of all samples in one dimension look like other
    # things, such as frames of videos: so this counts where it serves better.
    return max(found, _followed(captured, merged=True), key=_served)


def _served(found: Sharding) -> tuple[int, int]:
    """What makes one way of following tokens better than another one."""
    return len(found.attention), -len(found.unknown)


def _followed(captured: Captured, merged: bool) -> Sharding:
    """``merged``: tokens may begin before a view that parts those of samples."""
    out = Sharding()
    origins = _origins(captured, merged)
    for node in captured.graph.nodes:
        if node.op == "call_function":
            _visit(node, out)
        if node in origins and out.axes.get(node) is None and is_tensor(node):
            dim = origins[node]
            out.axes[node] = Axis(dim, (shape_of(node)[dim],))
            out.entries.add(node)
    return out


def _visit(node: fx.Node, out: Sharding) -> None:
    sources = [s for s in node.all_input_nodes if is_tensor(s)]
    shared = [s for s in sources if _any(out.axes.get(s))]
    if not shared:
        return
    name = operation(node)
    each = out.axes[shared[0]]
    if name == "getitem" and isinstance(each, list):
        out.axes[node] = each[node.args[1]]  # type: ignore[index]
        return
    if ATTENTION in name:
        found = _attention(node, out)
    elif name in PARTING or name == "cat":
        found = _along_tokens(node, out) or _flowing(node, out)
    else:
        found = _flowing(node, out) or _merged(node, out)
    if found is None:
        out.unknown.append(node)
        out.forms[node] = dict.fromkeys(sources)
        return
    axes, out.forms[node] = found
    out.axes[node] = axes


def _any(axes: Axes) -> bool:
    return any(a is not None for a in axes) if isinstance(axes, list) else axes is not None


_Found = tuple[Axes, dict[fx.Node, Form]] | None


def _flowing(node: fx.Node, out: Sharding) -> _Found:
    """The tokens of a node's inputs are tokens of its output."""
    flow = flow_of(node)
    axis: Axis | None = None
    for source, dims in flow.items():
        own = out.axis(source)
        if own is None or dims is None:
            continue
        dim = dims[own.dim]
        if dim is None or (axis is not None and axis != own.at(dim)):
            return None
        axis = own.at(dim)
    if axis is None or any(s not in flow for s in node.all_input_nodes if _any(out.axes.get(s))):
        return None
    forms: dict[fx.Node, Form] = {}
    for source in filter(is_tensor, node.all_input_nodes):
        dims = flow.get(source, [])
        if dims is None:
            forms[source] = out.axis(source)
        elif axis.dim in dims:
            forms[source] = axis.at(dims.index(axis.dim))
        else:
            forms[source] = None
    value = node.meta["val"]
    return ([axis] * len(value) if isinstance(value, (list, tuple)) else axis), forms


def _merged(node: fx.Node, out: Sharding) -> _Found:
    """A view puts the tokens of all samples into one dimension, or parts them again."""
    source = node.args[0]
    axis = out.axis(source) if isinstance(source, fx.Node) else None
    if axis is None or operation(node) not in VIEWS:
        return None
    assert isinstance(source, fx.Node)
    found = across(axis, shape_of(source), shape_of(node))
    return None if found is None else (found, {source: axis})


def _along_tokens(node: fx.Node, out: Sharding) -> _Found:
    """Sequences are put together, or part again, where they were put together."""
    name = operation(node)
    if name == "cat":
        parts: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
        dim = wrapped(int(argument(node, 1, "dim", 0)), len(shape_of(node)))
        own = [out.axis(p) for p in parts]
        if not flow_of(node) or any(a is not None and a.dim != dim for a in own):
            return None
        each = [
            Axis(dim, (shape_of(p)[dim],)) if a is None else a
            for p, a in zip(parts, own, strict=True)
        ]
        return joined(dim, [a.segments for a in each]), dict(zip(parts, each, strict=True))
    source = node.args[0]
    assert isinstance(source, fx.Node)
    axis = out.axis(source)
    dim = parted(node)
    if axis is None or axis.dim != dim:
        return None
    found = [axis.cut(begin, end) for begin, end in ranges_of(node, axis.length)]
    if any(segments is None for segments in found):
        return None
    axes: list[Axis | None] = [Axis(dim, segments) for segments in found if segments is not None]
    if name == "slice_scatter":
        part = node.args[1]
        assert isinstance(part, fx.Node)
        if out.axis(part) not in (None, axes[0]):
            return None
        return axis, {source: axis, part: axes[0]}
    return (axes[0] if name == "slice" else axes), {source: axis}


def parted(node: fx.Node) -> int:
    """The dimension of which a slice or split, or a write into a part, takes parts."""
    value = node.meta["val"]
    dims = len((value[0] if isinstance(value, (list, tuple)) else value).shape)
    return wrapped(int(argument(node, PARTING[operation(node)], "dim", 0)), dims)


def ranges_of(node: fx.Node, length: int) -> Iterator[tuple[int, int]]:
    """Which of so many tokens a slice has, or each part of a split; none for a slice with steps."""
    if operation(node) in ("slice", "slice_scatter"):
        place = PARTING[operation(node)]
        begin, end, step = (
            argument(node, place + i, which, 1 if i == 3 else None)
            for i, which in enumerate(("start", "end", "step"), 1)
        )
        begin, end, step = slice(begin, end, step).indices(length)
        yield (begin, max(begin, end)) if step == 1 else (-1, -1)
        return
    dim = parted(node)
    begin = 0
    for part in node.meta["val"]:
        yield begin, begin + part.shape[dim]
        begin += part.shape[dim]


def _attention(node: fx.Node, out: Sharding) -> _Found:
    query, key, value = node.args[:3]
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
    mask = argument(node, 3, "attn_mask")
    if argument(node, 5, "is_causal", False):
        return None
    tokens = len(shape_of(query)) - 2
    axes = [out.axis(n) for n in (query, key, value)]
    if all(a is None or a.dim < tokens for a in axes):
        return _batched(node, mask, out)
    if any(a is not None and a.dim != tokens for a in axes) or axes[1] != axes[2]:
        return None
    mine, theirs = axes[0], axes[1]
    forms: dict[fx.Node, Form] = {key: None, value: None, query: mine}
    if theirs is not None:
        # The same node may be query, key and value of pooled tokens: then it is whole for all.
        if query in (key, value):
            return None
        out.attention.append(node)
        forms[key] = forms[value] = Keys(theirs)
    if isinstance(mask, fx.Node):
        rows, columns = shape_of(mask)[-2:]
        last = len(shape_of(mask)) - 1
        whole = mine is None or rows == 1
        forms[mask] = Mask(
            None if whole or mine is None else mine.at(last - 1),
            None if theirs is None or columns == 1 else theirs.at(last),
        )
    return mine, forms


def _batched(node: fx.Node, mask: object, out: Sharding) -> _Found:
    """Attention within each of what is shared out, such as the frames of a video."""
    query, key, value = node.args[:3]
    axes = {a for n in (query, key, value) if (a := out.axis(n)) is not None}  # type: ignore[arg-type]
    shapes = {shape_of(n)[:-2] for n in (query, key, value)}  # type: ignore[arg-type]
    if len(axes) != 1 or len(shapes) != 1:
        return None
    (axis,) = axes
    forms: dict[fx.Node, Form] = dict.fromkeys((query, key, value), axis)  # type: ignore[arg-type]
    if isinstance(mask, fx.Node):
        before = len(shape_of(node)) - len(shape_of(mask))
        dim = axis.dim - before
        has = dim >= 0 and shape_of(mask)[dim] == axis.length
        forms[mask] = axis.at(dim) if has else None
    return axis, forms


def _origins(captured: Captured, merged: bool) -> dict[fx.Node, int]:
    """Where tokens begin: the nodes that queries of attention are made of, whose own inputs have no
    such dimension, and that dimension. ``merged``: see :func:`_followed`."""
    latents = {
        n
        for n in captured.graph.find_nodes(op="placeholder")
        if n.name in captured.inputs
        and captured.signature.inputs[captured.inputs[n.name]].role is Role.LATENTS
    }
    variant = captured.variant | latents
    ahead = [
        (node.args[0], len(shape_of(node.args[0])) - 2)  # type: ignore[arg-type]
        for node in captured.nodes
        if node in captured.variant and ATTENTION in operation(node)
    ]
    seen: set[tuple[fx.Node, int]] = set()
    origins: dict[fx.Node, int] = {}
    while ahead:
        node, dim = ahead.pop()
        assert isinstance(node, fx.Node)
        if (node, dim) in seen or node not in variant:
            continue
        seen.add((node, dim))
        sources = _sources(node, dim, merged)
        made_of = [(s, d) for s, d in sources if s in variant]
        if operation(node) == "getitem" and not all(_sources(*e, merged) for e in made_of):
            made_of = []  # one of several values of what nothing is known of
        ahead += made_of
        if not made_of and shape_of(node)[dim] > 1:
            origins.setdefault(node, dim)
    return origins


def _sources(node: fx.Node, dim: int, merged: bool) -> list[tuple[fx.Node, int]]:
    """The inputs of a node that have tokens where its output has them along ``dim``."""
    if node.op != "call_function":
        return []
    name = operation(node)
    if ATTENTION in name:
        query = node.args[0]
        assert isinstance(query, fx.Node)
        return [(query, dim)] if dim <= len(shape_of(query)) - 2 else []
    if name == "cat" and wrapped(int(argument(node, 1, "dim", 0)), len(shape_of(node))) == dim:
        return [(s, dim) for s in flow_of(node)]
    if name in PARTING and parted(node) == dim:
        into = node.args[: 2 if name == "slice_scatter" else 1]
        return [(source, dim) for source in into]  # type: ignore[misc]
    found = [
        (source, dims.index(dim))
        for source, dims in flow_of(node).items()
        if dims is not None and dim in dims
    ]
    if merged and not found and name in VIEWS:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        where = ending_alike(dim, shape_of(node), shape_of(source))
        return [] if where is None else [(source, where)]
    return found
