"""A rank's part of a sequence-parallel denoiser, as a graph."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ..graph.capture import Captured
from ..graph.layers.products import INTEGERS, ROWS, with_rows
from ..graph.program import KEEP, NBYTES, mark
from .axis import Axis
from .flow import flow_of, is_tensor, operation, shape_of
from .merging import VIEWS
from .sharding import ATTENTION, PARTING, Form, Keys, Mask, Sharding, parted, ranges_of

aten = torch.ops.aten

#: gather(local, dim): of all ranks, one after another along a dimension. All call it in the same
#: order.
Gather = Callable[[torch.Tensor, int], torch.Tensor]
#: In the metadata of such a call: for which node of the captured graph all meet, and how long the
#: dimension then is.
MEETING = "asyncdiff_meeting"
#: Operations that are told the sizes of their result.
SIZED = (*VIEWS, "expand")


def program(
    captured: Captured, sharding: Sharding, rank: int, ranks: int, gather: Gather
) -> fx.Graph:
    """What ``rank`` of so many computes: takes what ``captured.graph`` takes, on every rank the
    same, and returns what that returns, whole, on every rank."""
    return _Builder(captured, sharding, rank, ranks, gather).build()


class _Builder:
    def __init__(
        self, captured: Captured, sharding: Sharding, rank: int, ranks: int, gather: Gather
    ) -> None:
        self._captured, self._sharding = captured, sharding
        self._rank, self._ranks, self._gather = rank, ranks, gather
        self._graph = fx.Graph()
        #: values as their nodes have them, and in forms that others need
        self._own: dict[fx.Node, Any] = {}
        self._formed: dict[tuple[fx.Node, Form], fx.Node] = {}
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
        self._graph.eliminate_dead_code()
        return self._graph

    def _computed(self, node: fx.Node) -> Any:
        axes, name = self._sharding.axes.get(node), operation(node)
        forms = self._sharding.forms.get(node, {})
        source = node.args[0] if node.args else None
        if name == "getitem" and isinstance(self._own.get(source), list):  # type: ignore[arg-type]
            return self._own[source][node.args[1]]  # type: ignore[index]
        entry = node in self._sharding.entries
        axis = next((a for a in axes if a), None) if isinstance(axes, list) else axes
        if axis is not None and not entry and name in PARTING and parted(node) == axis.dim:
            assert isinstance(source, fx.Node)
            return self._parts(node, source, forms)
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda n: self._given(n, forms.get(n, self._sharding.axis(n)))
        )
        made = self._made(node, args, kwargs, None if entry else axis)
        if node not in self._sharding.axes:
            mark(self._captured, node, made)
        return made

    def _made(
        self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], axis: Axis | None
    ) -> fx.Node:
        """What a node does with other arguments, for a share of its tokens, if there is an axis."""
        if axis is not None and operation(node) in SIZED:
            size = list(shape_of(node))
            size[axis.dim] = axis.local(self._rank, self._ranks)
            args = (args[0], size, *args[2:])
        target = node.target
        if axis is not None and operation(node) in VIEWS:
            target = aten.reshape.default  # a share may not lie as the whole does
        rows = ROWS
        if axis is not None and axis.dim == 0:
            rows = axis.local(self._rank, self._ranks)
        if target is INTEGERS and rows < ROWS:
            made = with_rows(self._graph, target, args, 0, rows)[-1]
        else:
            made = self._graph.call_function(target, args, kwargs)  # type: ignore[arg-type]
        made.meta = {k: v for k, v in node.meta.items() if k != "val"}
        return made

    def _parts(self, node: fx.Node, source: fx.Node, forms: Mapping[fx.Node, Form]) -> Any:
        """What a node does to parts of its tokens, to those that this rank has of them."""
        axis = forms[source]
        assert isinstance(axis, Axis)
        whole = self._given(source, axis)
        places = self._places(node, axis)
        if operation(node) == "slice_scatter":
            ((dim, begin, length),) = places
            part = node.args[1]
            assert isinstance(part, fx.Node)
            args = (whole, self._given(part, forms[part]), dim, begin, begin + length)
            return self._graph.call_function(aten.slice_scatter.default, args)
        parts = [
            self._graph.call_function(aten.narrow.default, (whole, *where)) for where in places
        ]
        return parts[0] if operation(node) == "slice" else parts

    def _places(self, node: fx.Node, axis: Axis) -> list[tuple[int, int, int]]:
        """Dimension, begin and length of the parts of a slice or split in this rank's tokens."""
        out = []
        for begin, end in ranges_of(node, axis.length):
            before = axis.cut(0, begin)
            inside = axis.cut(begin, end)
            assert before is not None and inside is not None
            start, length = (
                Axis(axis.dim, s).local(self._rank, self._ranks) for s in (before, inside)
            )
            out.append((axis.dim, start, length))
        return out

    def _given(self, node: fx.Node, form: Form) -> Any:
        """A node's value in this form."""
        axis = self._sharding.axis(node)
        if not is_tensor(node) or form == axis:
            return self._own[node]
        if (node, form) not in self._formed:
            self._formed[node, form] = self._make(node, axis, form)
        return self._formed[node, form]

    def _make(self, node: fx.Node, axis: Axis | None, form: Form) -> fx.Node:
        if isinstance(form, Keys):
            assert axis == form.axis and self._building is not None
            dim = form.axis.dim
            local = self._outermost(node, dim)
            made = self._graph.call_function(self._gather, (local, dim))
            made.meta[MEETING] = self._building.name, form.axis.length
            return made
        if axis is not None:
            # Whole, in its own order; then, if need be, in another form.
            keys = self._given(node, Keys(axis))
            whole = self._sorted(keys, axis)
            return whole if form is None else self._of_whole(whole, form)
        if isinstance(form, Axis) and (shared := self._view_of_share(node, form)) is not None:
            return shared
        return self._of_whole(self._own[node], form)

    def _outermost(self, node: fx.Node, dim: int) -> fx.Node:
        """A rank's share of a value that attention alone takes all of, with its tokens outermost in
        memory: so those of two ranks, one stretch each, can be put together where they arrive.
        A compiler has whoever computes it write it so at once."""
        local: fx.Node = self._own[node]
        whole = node.meta["val"]
        last = dim == whole.dim() - 1  # attention wants elements beside each other
        if self._ranks != 2 or last or any(operation(user) != ATTENTION for user in node.users):
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

    def _of_whole(self, whole: fx.Node, form: Form) -> fx.Node:
        if isinstance(form, Axis):
            return self._cut(whole, form)
        assert isinstance(form, Mask)
        if form.rows is not None:
            whole = self._cut(whole, form.rows)
        if form.keys is not None and form.keys.order(self._ranks) is not None:
            every = [r for rank in range(self._ranks) for r in form.keys.ranges(rank, self._ranks)]
            whole = self._picked(whole, form.keys.dim, every)
        return whole

    def _cut(self, whole: fx.Node, axis: Axis) -> fx.Node:
        """This rank's share."""
        return self._picked(whole, axis.dim, axis.ranges(self._rank, self._ranks))

    def _sorted(self, keys: fx.Node, axis: Axis) -> fx.Node:
        """All tokens in their own order, of those in the order of ranks."""
        if axis.order(self._ranks) is None:
            return keys
        each = [axis.ranges(rank, self._ranks) for rank in range(self._ranks)]
        lengths = [end - begin for ranges in each for begin, end in ranges]
        starts = list(itertools.accumulate(lengths, initial=0))
        segments = len(axis.segments)
        where = [
            (starts[rank * segments + s], starts[rank * segments + s + 1])
            for s in range(segments)
            for rank in range(self._ranks)
        ]
        return self._picked(keys, axis.dim, where)

    def _picked(self, value: fx.Node, dim: int, ranges: Sequence[tuple[int, int]]) -> fx.Node:
        some = [(begin, end) for begin, end in ranges if end > begin] or ranges[:1]
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
