"""Writes to tensors in an exported graph, replaced by operations that make new tensors.

A graph that is cut into pieces has no place for in-place operations. torch's own way without them
(``ExportedProgram.run_decompositions``) traces the whole graph again, twice, for what are mostly a
few writes to parts of a new tensor, as rotary embeddings are put together.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg

_aten = torch.ops.aten
_Operation = torch._ops.OpOverload
#: Views of a part of a tensor, and what puts a new part in its place.
_PUT_BACK: dict[Any, Any] = {
    _aten.slice.Tensor: _aten.slice_scatter.default,
    _aten.select.int: _aten.select_scatter.default,
    _aten.diagonal.default: _aten.diagonal_scatter.default,
}
#: Views of the whole of it.
_SAME = (_aten.alias.default, _aten.detach.default)


def writes(node: fx.Node) -> bool:
    """Whether a node changes a tensor that it is given."""
    return isinstance(node.target, _Operation) and node.target._schema.is_mutable


def replace_writes(graph: fx.Graph) -> bool:
    """Rewrite a graph of ATen operations, with example tensors in its metadata, without writes.

    False, and the graph as it was, where one writes to an input or a weight, through a view that
    cannot be put back, or has no counterpart that makes a new tensor.
    """
    nodes = list(graph.nodes)
    roots = {node: root for node in nodes if (root := _root(node)) is not None}
    writing = [node for node in nodes if writes(node)]
    if not all(_replaceable(node, roots) for node in writing):
        return False
    written = {roots[_first(node)] for node in writing}
    if not all(_again(n) for n, root in roots.items() if root in written and n is not root):
        return False
    _Rewriting(graph, roots).run(nodes)
    return True


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def _root(node: fx.Node) -> fx.Node | None:
    """The node that made the memory in which this one's value lies; None: no tensor."""
    while writes(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    mine = _storage(node)
    if mine is None:
        return None
    above = _shared(node)
    while above:
        node = above[0]
        above = _shared(node)
    return node


def _shared(node: fx.Node) -> list[fx.Node]:
    """Those in whose memory a node's value lies, of what it is made of."""
    if writes(node):
        return [_first(node)]
    mine = _storage(node)
    return [s for s in _sources(node) if mine is not None and _storage(s) == mine]


def _sources(node: fx.Node) -> list[fx.Node]:
    """What a node is made of; a part of a list, what the list is made of."""
    lists = [s for s in node.all_input_nodes if isinstance(s.meta.get("val"), (list, tuple))]
    return [*node.all_input_nodes, *(x for s in lists for x in s.all_input_nodes)]


def _counterpart(node: fx.Node) -> Any:
    """What makes a new tensor of what an in-place operation writes; None: there is nothing."""
    target: Any = node.target
    name = target._schema.name.removeprefix("aten::")
    packet = getattr(_aten, name.removesuffix("_"), None)
    if packet is None or not name.endswith("_") or torch.Tag.nondeterministic_seeded in target.tags:
        return None
    return getattr(packet, target._overloadname, None)


def _replaceable(node: fx.Node, roots: dict[fx.Node, fx.Node]) -> bool:
    target: Any = node.target
    first, *others = target._schema.arguments
    if any(a.is_write for a in others) or _counterpart(node) is None or node not in roots:
        return False
    path = _path(_first(node), roots)
    known = all(v.target in _PUT_BACK or v.target in _SAME or writes(v) for v in path)
    return known and first.is_write and roots[node].op == "call_function"


def _path(view: fx.Node, roots: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """The views from one to its root, without that."""
    found = []
    while view is not roots[view]:
        found.append(view)
        view = _shared(view)[0]
    return found


def _again(node: fx.Node) -> bool:
    """Whether a view can be made once more, of memory with other values."""
    if node.target is operator.getitem:
        source = node.all_input_nodes[0]
        return isinstance(source.target, _Operation) and not writes(source)
    return isinstance(node.target, _Operation) and len(_shared(node)) == 1


class _Rewriting:
    def __init__(self, graph: fx.Graph, roots: dict[fx.Node, fx.Node]) -> None:
        self._graph, self._roots = graph, roots
        examples = (n.meta.get("val") for n in graph.nodes)
        self._mode: Any = next(x.fake_mode for x in examples if isinstance(x, FakeTensor))
        #: by root that was written to: by view of it, the node that has its present value
        self._now: dict[fx.Node, dict[fx.Node, fx.Node]] = {}

    def run(self, nodes: list[fx.Node]) -> None:
        for node in nodes:
            with self._graph.inserting_before(node):
                if writes(node):
                    self._write(node)
                elif self._of(node) not in self._now:  # views are made again where they are used
                    node.args, node.kwargs = self._renewed(node.args), self._renewed(node.kwargs)
        for node in reversed(nodes):
            if (writes(node) or self._of(node) in self._now) and not node.users:
                self._graph.erase_node(node)
        self._graph.eliminate_dead_code()

    def _of(self, node: fx.Node) -> fx.Node | None:
        """The root of a tensor, or of those in a list."""
        if isinstance(node.meta.get("val"), (list, tuple)):
            return next((self._roots.get(s) for s in node.all_input_nodes), None)
        return self._roots.get(node)

    def _renewed(self, given: Any) -> Any:
        return map_arg(given, self._fresh)

    def _fresh(self, node: fx.Node) -> fx.Node:
        """The node that has the present value of ``node``."""
        root = self._of(node)
        now = self._now.get(root) if root is not None else None
        if now is None:
            return node
        if node not in now:
            if writes(node):
                now[node] = self._fresh(_first(node))
            else:
                now[node] = self._make(node, node.target, node.args, node.kwargs)
        return now[node]

    def _write(self, node: fx.Node) -> None:
        view = _first(node)
        root, shown = self._roots[view], view.meta["val"]
        new = None
        if node.target is _aten.copy_.default and isinstance(node.args[1], fx.Node):
            new = self._fresh(node.args[1])
        if new is None or not _alike(new.meta["val"], shown):
            new = self._make(node, _counterpart(node), node.args, node.kwargs)
        if not _alike(new.meta["val"], shown):
            new = self._make(node, _aten.copy.default, (view, new), {})
        for part in _path(view, self._roots):
            if part.target in _PUT_BACK:
                args = (_first(part), new, *part.args[1:])
                new = self._make(node, _PUT_BACK[part.target], args, part.kwargs)
        self._now[root] = {root: new}

    def _make(self, like: fx.Node, target: Any, args: Any, kwargs: Any) -> fx.Node:
        """A new node, of present values, in the module in which ``like`` is."""
        args, kwargs = self._renewed(args), self._renewed(kwargs)
        made = self._graph.call_function(target, args, kwargs)
        made.meta = {k: v for k, v in like.meta.items() if k != "val"}
        args, kwargs = map_arg((args, kwargs), lambda n: n.meta["val"])
        with self._mode:
            made.meta["val"] = target(*args, **kwargs)
        return made


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)


def _first(node: fx.Node) -> fx.Node:
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first
