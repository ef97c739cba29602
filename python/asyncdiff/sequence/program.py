"""A rank's part of a sequence-parallel denoiser, as a graph."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from ..graph.capture import Captured
from ..graph.layers.products import INTEGERS, ROWS, with_rows
from ..graph.program import KEEP, NBYTES, mark
from .axis import Axis
from .checking import Check
from .flow import flow_of
from .merging import VIEWS
from .nodes import is_tensor, operation, shape_of
from .sharding import ATTENTION, PARTING, Form, Keys, Mask, Sharding, parted, ranges_of
from .shares import Shares

aten = torch.ops.aten

#: gather(local, dim): of all ranks, one after another along a dimension. All call it in the same
#: order.
Gather = Callable[[torch.Tensor, int], torch.Tensor]
#: In the metadata of such a call: a :class:`Meeting`.
MEETING = "asyncdiff_meeting"
#: Views of a share that are told the sizes of their result, as it may not lie as the whole does.
RESHAPED = (*VIEWS, "unflatten")


class Meeting(NamedTuple):
    """What ranks meet for: the node of the captured graph that takes the values of all, how long
    the dimension then is, and which ranks have any of it to give."""

    taker: str
    length: int
    givers: tuple[int, ...]


def program(
    captured: Captured,
    sharding: Sharding,
    rank: int,
    shares: Shares,
    gather: Gather,
    check: Check | None = None,
) -> fx.Graph:
    """What ``rank`` computes, whose share of the tokens ``shares`` tells: takes what
    ``captured.graph`` takes, on every rank the same, and returns what that returns, whole, on every
    rank. A rank without any tokens of a stream has no node for it. ``check`` looks at what nodes
    make of shares, and raises TokensError where it is something else than a share."""
    return _Builder(captured, sharding, rank, shares, gather, check).build()


class _Builder:
    def __init__(
        self,
        captured: Captured,
        sharding: Sharding,
        rank: int,
        shares: Shares,
        gather: Gather,
        check: Check | None,
    ) -> None:
        self._captured, self._sharding = captured, sharding
        self._rank, self._shares, self._gather, self._check = rank, shares, gather, check
        self._graph = fx.Graph()
        #: values as their nodes have them, and in forms that others need; None where this rank has
        #: no tokens of them
        self._own: dict[fx.Node, Any] = {}
        self._formed: dict[tuple[fx.Node, Form], fx.Node | None] = {}
        self._staying = self._values_that_stay()
        #: the node that is being built
        self._building: fx.Node | None = None

    def build(self) -> fx.Graph:
        for node in self._captured.graph.nodes:
            self._building = node
            if node.op == "output":
                outputs = [
                    self._given(o, None) if isinstance(o, fx.Node) else o
                    for o in self._captured.outputs
                ]
                self._graph.output(tuple(outputs))
            elif node.op == "call_function":
                self._own[node] = self._computed(node)
            else:
                self._own[node] = self._graph.node_copy(node)
                mark(self._captured, node, self._own[node])
            if node in self._sharding.entries:
                axis = self._sharding.axis(node)
                assert axis is not None
                self._formed[node, None] = self._own[node]
                self._own[node] = self._cut(self._own[node], axis)
        # All ranks meet, also those that make no use of it.
        self._graph.eliminate_dead_code(lambda n: n.is_impure() or MEETING in n.meta)
        return self._graph

    def _values_that_stay(self) -> set[fx.Node]:
        """Values that are to be gathered where one rank has all tokens of them, and of all that is
        made of them: it has them whole, and nobody else needs them."""
        takers: dict[fx.Node, set[int]] = {}
        everybody = range(self._shares.ranks)
        for node, forms in self._sharding.forms.items():
            own = None if node in self._sharding.entries else self._sharding.axis(node)
            takes = everybody if own is None else own.owners(self._shares)
            for source, form in forms.items():
                if form != self._sharding.axis(source):
                    takers.setdefault(source, set()).update(takes)
        for out in self._captured.outputs:
            takers.setdefault(out, set()).update(everybody)
        return {
            source
            for source, takes in takers.items()
            if (axis := self._sharding.axis(source)) is not None
            and len(owners := axis.owners(self._shares)) == 1
            and takes == set(owners)
        }

    def _computed(self, node: fx.Node) -> Any:
        axes, name = self._sharding.axes.get(node), operation(node)
        forms = self._sharding.forms.get(node, {})
        # Whatever this rank has of the result: at gathers it meets the others.
        given = {
            n: self._given(n, forms.get(n, self._sharding.axis(n))) for n in node.all_input_nodes
        }
        source = node.args[0] if node.args else None
        if name == "getitem" and isinstance(given.get(source), list):  # type: ignore[arg-type]
            return given[source][node.args[1]]  # type: ignore[index]
        entry = node in self._sharding.entries
        axis = next((a for a in axes if a), None) if isinstance(axes, list) else axes
        if axis is not None and not entry and name in PARTING and parted(node) == axis.dim:
            assert isinstance(source, fx.Node)
            return self._parts(node, source, forms)
        if axis is not None and not entry and not axis.local(self._rank, self._shares):
            return None
        if axis is not None and name == "cat" and None in given.values():
            return self._put_together(node, given, axis.dim)
        sources: dict[fx.Node, tuple[fx.Node, Form]] = {}

        def mine(n: fx.Node) -> fx.Node:
            made: fx.Node = self._nothing(n) if given[n] is None else given[n]
            sources[made] = n, forms.get(n, self._sharding.axis(n))
            return made

        args, kwargs = fx.map_arg((node.args, node.kwargs), mine)
        made = self._made(node, args, kwargs, None if entry else axis)
        if self._check is not None and axis is not None and not entry:
            self._check(node, made, sources, axis, self._rank, self._shares)
        if node not in self._sharding.axes:
            mark(self._captured, node, made)
        return made

    def _made(
        self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], axis: Axis | None
    ) -> fx.Node:
        """What a node does with other arguments, for a share of its tokens, if there is an axis."""
        target, name = node.target, operation(node)
        if axis is not None and name in (*RESHAPED, "expand"):
            size = list(shape_of(node))
            size[axis.dim] = axis.local(self._rank, self._shares)
            args = (args[0], size)
            if name != "expand":
                target, kwargs = aten.reshape.default, {}
        if axis is not None and name == "squeeze":  # a share may be one token
            (dims,) = flow_of(node).values()
            assert dims is not None
            gone = [d for d, to in enumerate(dims) if to is None]
            target, args, kwargs = aten.squeeze.dims, (args[0], gone), {}
        rows = ROWS
        if axis is not None and axis.dim == 0:
            rows = axis.local(self._rank, self._shares)
        if target is INTEGERS and rows < ROWS:
            made = with_rows(self._graph, target, args, 0, rows)[-1]
        else:
            made = self._graph.call_function(target, args, kwargs)  # type: ignore[arg-type]
        made.meta = {k: v for k, v in node.meta.items() if k != "val"}
        return made

    def _nothing(self, node: fx.Node) -> fx.Node:
        """No tokens of a value, as a tensor."""
        value, axis = node.meta["val"], self._sharding.axis(node)
        assert axis is not None
        size = [0 if d == axis.dim else n for d, n in enumerate(value.shape)]
        order = sorted(range(value.dim()), key=lambda d: (-value.stride(d), d))
        like = {"dtype": value.dtype, "device": value.device}
        return self._graph.call_function(aten.empty_permuted.default, (size, order), like)

    def _put_together(
        self, node: fx.Node, given: Mapping[fx.Node, fx.Node | None], dim: int
    ) -> fx.Node:
        """Those of several sequences of which this rank has tokens, one after another."""
        sequences: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
        parts = [part for n in sequences if (part := given[n]) is not None]
        made = parts[0]
        if len(parts) > 1:
            made = self._graph.call_function(aten.cat.default, (parts, dim))
            made.meta = {k: v for k, v in node.meta.items() if k != "val"}
        dtype = node.meta["val"].dtype  # may be that of a part of which this rank has nothing
        if all(n.meta["val"].dtype != dtype for n in sequences if given[n] is not None):
            made = self._graph.call_function(aten.to.dtype, (made, dtype))
        return made

    def _parts(self, node: fx.Node, source: fx.Node, forms: Mapping[fx.Node, Form]) -> Any:
        """What a node does to parts of its tokens, to those that this rank has of them."""
        axis = forms[source]
        assert isinstance(axis, Axis)
        whole = self._given(source, axis)
        places = self._places(node, axis)
        if operation(node) == "slice_scatter":
            ((begin, end),) = places
            part = node.args[1]
            assert isinstance(part, fx.Node)
            if begin == end:
                return whole
            args = (whole, self._given(part, forms[part]), axis.dim, begin, end)
            return self._graph.call_function(aten.slice_scatter.default, args)
        length = axis.local(self._rank, self._shares)
        parts = [self._picked(whole, axis.dim, length, [where]) for where in places]
        return parts[0] if operation(node) == "slice" else parts

    def _places(self, node: fx.Node, axis: Axis) -> list[tuple[int, int]]:
        """Where the parts of a slice or split lie in this rank's tokens."""
        out = []
        for begin, end in ranges_of(node, axis.length):
            before = axis.cut(0, begin)
            inside = axis.cut(begin, end)
            assert before is not None and inside is not None
            start, length = (
                Axis(axis.dim, s).local(self._rank, self._shares) for s in (before, inside)
            )
            out.append((start, start + length))
        return out

    def _given(self, node: fx.Node, form: Form) -> Any:
        """A node's value in this form."""
        axis = self._sharding.axis(node)
        if not is_tensor(node) or form == axis:
            return self._own[node]
        if (node, form) not in self._formed:
            self._formed[node, form] = self._make(node, axis, form)
        return self._formed[node, form]

    def _make(self, node: fx.Node, axis: Axis | None, form: Form) -> fx.Node | None:
        if isinstance(form, Keys):
            assert axis == form.axis
            return self._gathered(node, form.axis)
        if axis is not None:
            # Whole, in its own order; then, if need be, in another form.
            keys = self._given(node, Keys(axis))
            whole = self._sorted(keys, axis)
            return whole if form is None else self._of_whole(whole, form)
        if isinstance(form, Axis) and not form.local(self._rank, self._shares):
            return None
        if isinstance(form, Axis) and (shared := self._view_of_share(node, form)) is not None:
            return shared
        return self._of_whole(self._own[node], form)

    def _gathered(self, node: fx.Node, axis: Axis) -> fx.Node | None:
        """The tokens of all ranks, of those that have any."""
        assert self._building is not None
        owners = axis.owners(self._shares)
        if node in self._staying or not owners:
            return self._own[node] if owners else self._nothing(node)
        local = self._outermost(node, axis.dim)
        made = self._graph.call_function(self._gather, (local, axis.dim))
        made.meta[MEETING] = Meeting(self._building.name, axis.length, owners)
        return made

    def _outermost(self, node: fx.Node, dim: int) -> fx.Node:
        """A rank's share of a value that attention alone takes all of, with its tokens outermost in
        memory: so those of two ranks, one stretch each, can be put together where they arrive.
        A compiler has whoever computes it write it so at once."""
        local: fx.Node = self._nothing(node) if self._own[node] is None else self._own[node]
        whole = node.meta["val"]
        last = dim == whole.dim() - 1  # attention wants elements beside each other
        if (
            self._shares.ranks != 2
            or last
            or any(operation(user) != ATTENTION for user in node.users)
        ):
            return local
        order = sorted(range(whole.dim()), key=lambda d: (d != dim, -whole.stride(d), d))
        if all(whole.stride(dim) > whole.stride(d) for d in order[1:] if whole.shape[d] > 1):
            return local
        call = self._graph.call_function
        moved = call(aten.permute.default, (local, order))
        dense = call(aten.clone.default, (moved,), {"memory_format": torch.contiguous_format})
        made = call(aten.permute.default, (dense, [order.index(d) for d in range(whole.dim())]))
        for each in (moved, dense, made):
            each.meta = {k: v for k, v in local.meta.items() if k == "nn_module_stack"}
        return made

    def _view_of_share(self, node: fx.Node, axis: Axis) -> fx.Node | None:
        """Of a view of a whole value the share, as a view of that value's share: so values that
        each block looks at anew, such as rotary embeddings, are shared out once."""
        source = node.args[0] if node in self._captured.views else None
        if not isinstance(source, fx.Node) or self._sharding.axis(source) is not None:
            return None
        if isinstance(source.meta["val"], (list, tuple)):  # one of several values, as it is
            return None
        dims = flow_of(node).get(source) if is_tensor(source) else None
        if dims is None or axis.dim not in dims or len(node.all_input_nodes) > 1:
            return None
        dim = dims.index(axis.dim)
        if shape_of(source)[dim] != axis.length:
            return None
        if any(isinstance(n.meta["val"], (list, tuple)) for n in (node, source)):
            return None
        share = self._given(source, axis.at(dim))
        return self._made(node, (share, *node.args[1:]), dict(node.kwargs), axis)

    def _of_whole(self, whole: fx.Node | None, form: Form) -> fx.Node | None:
        if isinstance(form, Axis):
            return self._cut(whole, form)
        assert isinstance(form, Mask)
        if form.rows is not None:
            whole = self._cut(whole, form.rows)
        if form.keys is not None:
            axis = form.keys
            every = [
                r for rank in range(self._shares.ranks) for r in axis.ranges(rank, self._shares)
            ]
            whole = self._picked(whole, axis.dim, axis.length, every)
        return whole

    def _cut(self, whole: fx.Node | None, axis: Axis) -> fx.Node | None:
        """This rank's share."""
        return self._picked(whole, axis.dim, axis.length, axis.ranges(self._rank, self._shares))

    def _sorted(self, keys: fx.Node | None, axis: Axis) -> fx.Node | None:
        """All tokens in their own order, of those in the order of ranks."""
        each = [axis.ranges(rank, self._shares) for rank in range(self._shares.ranks)]
        lengths = [end - begin for ranges in each for begin, end in ranges]
        starts = list(itertools.accumulate(lengths, initial=0))
        segments = len(axis.segments)
        where = [
            (starts[rank * segments + s], starts[rank * segments + s + 1])
            for s in range(segments)
            for rank in range(self._shares.ranks)
        ]
        return self._picked(keys, axis.dim, axis.length, where)

    def _picked(
        self, value: fx.Node | None, dim: int, length: int, ranges: Sequence[tuple[int, int]]
    ) -> fx.Node | None:
        """These of ``length`` tokens, one after another; None: no tokens."""
        some: list[tuple[int, int]] = []
        for begin, end in ranges:
            if some and some[-1][1] == begin:
                some[-1] = some[-1][0], end
            elif end > begin:
                some.append((begin, end))
        if value is None or not some:
            return None
        if some == [(0, length)]:
            return value
        parts = [
            self._graph.call_function(aten.narrow.default, (value, dim, begin, end - begin))
            for begin, end in some
        ]
        if len(parts) == 1:
            return parts[0]
        made = self._graph.call_function(aten.cat.default, (parts, dim))
        # What is the same for a whole generation is put together once.
        made.meta |= {k: value.meta[k] for k in (KEEP, NBYTES) if k in value.meta}
        return made
