"""What was traced of layers, put in the place of their repeats in an exported graph."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from ..state.alike import storage, weights_in

_STACK = "nn_module_stack"


class UnfollowedError(BaseException):
    """What repeats of a layer compute cannot be told from the first one: trace them all. Denoisers
    that go on after an Exception do not catch it."""


@dataclass
class Body:
    """A layer that is traced, when it is called for the first time. ``returns``: where each part of
    its result is from: "given" it, with the argument's place, "made" by it, with the place among
    these, or "plain", itself. In the graph: the nodes of tensors that it is given, its own, those
    of what it ``made``, and how many modules it lies in."""

    number: int
    path: str
    layer: nn.Module
    spec: pytree.TreeSpec
    returns: Sequence[tuple[str, Any]]
    made: Sequence[Tensor]
    inputs: Sequence[fx.Node] = ()
    nodes: list[fx.Node] = field(default_factory=list)
    results: Sequence[fx.Node] = ()
    depth: int = 0


@torch.library.custom_op("asyncdiff::repeat", mutates_args=())
def repeat(inputs: list[Tensor], body: int, path: str) -> list[Tensor]:
    """What the layer at ``path`` makes, which computes as a ``body`` that was traced before."""
    raise RuntimeError("it is taken out of the graph")


@torch.library.custom_op("asyncdiff::edge", mutates_args=())
def edge(tensors: list[Tensor], body: int, ends: bool) -> None:
    """Where a body begins, with what the layer is given, or ends, with what it makes."""


@edge.register_fake
def _nothing(tensors: list[Tensor], body: int, ends: bool) -> None:
    return None


#: No node of a graph has such a number.
_NUMBERS = itertools.count(10**9)
_REPEAT, _EDGE = torch.ops.asyncdiff.repeat.default, torch.ops.asyncdiff.edge.default
fx.node.has_side_effect(_EDGE)


def put_in(module: nn.Module, program: Any, bodies: Sequence[Body | None]) -> None:
    """Take ``repeat`` and ``edge`` out of the program that torch.export made of ``module``, putting
    in the ``bodies`` by number; None is one that repeats nothing. Raises UnfollowedError where that
    cannot be."""
    graph: fx.Graph = program.graph_module.graph
    weights, under_way = _Weights(module, program), list[Body]()
    for node in list(graph.nodes):
        if node._erased:
            continue
        if node.target is _EDGE:
            _edge(node, bodies, under_way)
            graph.erase_node(node)
            continue
        added = [node]
        if node.target is _REPEAT:
            added = _replace(node, bodies, under_way, weights)
        for body in under_way:
            body.nodes += added
    for other in program.graph_module.modules():
        inside = getattr(other, "graph", None)
        if inside is not None and any(n.target in (_EDGE, _REPEAT) for n in inside.nodes):
            raise UnfollowedError("a layer lies in a graph of its own")
    _number(graph, program)


def _edge(node: fx.Node, bodies: Sequence[Body | None], under_way: list[Body]) -> None:
    tensors: Any
    number: Any
    tensors, number, ends = node.args
    body = bodies[number]
    if ends:
        if body is None or not under_way or under_way.pop() is not body:
            raise UnfollowedError("layers do not lie in each other")
        body.results = list(tensors)
    elif body is not None:
        under_way.append(body)
        body.inputs, body.depth = list(tensors), len(node.meta[_STACK])


def _replace(
    node: fx.Node, bodies: Sequence[Body | None], under_way: Sequence[Body], weights: _Weights
) -> list[fx.Node]:
    """Put a body in the place of a repeat of it; the new nodes."""
    inputs: Any
    number: Any
    inputs, number, path = node.args
    body = bodies[number]
    if body is None or not body.results or body in under_way:
        raise UnfollowedError(f"{path} repeats what was not traced as a whole")
    copying = _Copying(node, body, str(path), inputs, weights.of(body.layer, str(path)))
    new = [copying.copy(source) for source in body.nodes]
    for part in list(node.users):
        result: Any = part.args[1]
        part.replace_all_uses_with(copying.nodes[body.results[result]])
        node.graph.erase_node(part)
    node.graph.erase_node(node)
    return new


class _Weights:
    """The nodes of a module's weights, and which of them stand for which in layers alike."""

    def __init__(self, module: nn.Module, program: Any) -> None:
        self._module = module
        nodes = {n.name: n for n in program.graph_module.graph.find_nodes(op="placeholder")}
        every = dict(weights_in(module))
        specs = program.graph_signature.input_specs
        names = {s.arg.name: s.target for s in specs if s.kind.name in ("PARAMETER", "BUFFER")}
        #: by node the tensor, and by tensor the node
        self._tensors = {nodes[name]: every[target] for name, target in names.items()}
        self._nodes = {id(tensor): node for node, tensor in self._tensors.items()}
        #: constants that layers made for themselves, which are the same ones each time
        self._constants = {nodes[s.arg.name] for s in specs if s.kind.name.startswith("CONSTANT")}

    def of(self, first: nn.Module, path: str) -> Callable[[fx.Node], fx.Node | None]:
        """What tells which node stands, for the layer at ``path``, for one that ``first`` uses;
        None for what is none of either's, nor of all layers'."""
        layer = self._module.get_submodule(path)
        mine, theirs = dict(weights_in(first)), dict(weights_in(layer))
        names = {id(tensor): name for name, tensor in mine.items()}

        def like(node: fx.Node) -> fx.Node | None:
            tensor = self._tensors.get(node)
            if tensor is None:
                return node if node in self._constants or node.op == "get_attr" else None
            name = names.get(id(tensor))  # none: of a layer that both have
            return node if name is None else self._nodes[id(theirs[name])]

        return like


class _Copying:
    """Copies a body's nodes for the layer at ``path``, before the node that repeats it."""

    def __init__(
        self,
        node: fx.Node,
        body: Body,
        path: str,
        inputs: Sequence[fx.Node],
        weight: Callable[[fx.Node], fx.Node | None],
    ) -> None:
        self._before, self._body, self._path, self._weight = node, body, path, weight
        #: by node of the body the one that stands for it
        self.nodes = dict(zip(body.inputs, inputs, strict=True))
        #: by memory of an example tensor of the body, an example in what stands for it
        self._memory: dict[int, Tensor] = {}
        #: by node of the body, what the repeat has made, which others have made views of
        self._made: dict[fx.Node, Tensor] = dict(zip(body.results, node.meta["val"], strict=True))
        for there, here in self.nodes.items():
            self._memory[storage(there.meta["val"])] = here.meta["val"]
        for there, example in self._made.items():
            self._memory[storage(there.meta["val"])] = example
        self._stack: dict[str, Any] = node.meta[_STACK]

    def copy(self, source: fx.Node) -> fx.Node:
        """A copy of a node of the body."""
        graph: fx.Graph = source.graph
        with graph.inserting_before(self._before):
            made = graph.create_node(
                source.op,
                source.target,
                fx.map_arg(source.args, self._like),
                fx.map_arg(source.kwargs, self._like),
                # A name that nothing has, until operations get theirs: where it is taken, fx tries
                # all numbers up to the next one that is free.
                source.name if source.op == "get_attr" else f"{source.name}_{next(_NUMBERS)}",
                source.type,
            )
        made.meta = {**source.meta, _STACK: self._stack | self._inside(source.meta[_STACK])}
        if source in self._made:
            made.meta["val"] = self._made[source]
        elif isinstance(source.meta.get("val"), Tensor):
            made.meta["val"] = self._example(source.meta["val"])
        elif "val" in source.meta:
            made.meta["val"] = pytree.tree_map_only(Tensor, self._example, source.meta["val"])
        self.nodes[source] = made
        return made

    def _like(self, node: fx.Node) -> fx.Node:
        if node not in self.nodes:
            found = self._weight(node)
            if found is None:
                raise UnfollowedError(f"{self._body.path} uses {node}, which it was not given")
            self.nodes[node] = found
            for there, here in zip(_examples(node), _examples(found), strict=True):
                self._memory.setdefault(storage(there), here)
        return self.nodes[node]

    def _example(self, there: Tensor) -> Tensor:
        """An example tensor like one of the body, in memory that is shared as that is."""
        mode: Any = there.fake_mode  # type: ignore[attr-defined]
        shape, stride, first = there.shape, there.stride(), there.storage_offset()
        base = self._memory.get(storage(there))
        if isinstance(base, FakeTensor):
            if base.dtype != there.dtype:
                raise UnfollowedError(f"{self._body.path} looks at memory in another dtype")
            with mode, torch.no_grad():
                return base.as_strided(shape, stride, first)
        if base is None:
            count = there.untyped_storage().nbytes()
            base = torch.empty(count, dtype=torch.uint8, device="meta")
            self._memory[storage(there)] = base
        # Many times faster than an operation that the mode looks at.
        made = base.view(there.dtype).as_strided(shape, stride, first)
        return FakeTensor(mode, made, there.device)

    def _inside(self, stack: Mapping[str, Any]) -> dict[str, Any]:
        """The modules within the layer in which a node lies."""
        found = {}
        for key, (name, *rest) in list(stack.items())[self._body.depth :]:
            new = name.replace(self._body.path, self._path, 1)
            found[key.replace(name, new, 1)] = (new, *rest)
        return found


def _examples(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    return [value] if isinstance(value, Tensor) else []


def _number(graph: fx.Graph, program: Any) -> None:
    """Give operations the names that they would have if all had been traced: numbered in order."""
    graph._graph_namespace = names = fx.graph._Namespace()
    operations = [n for n in graph.nodes if n.op == "call_function"]
    names._used_names.update(n.name for n in graph.nodes if n.op != "call_function")
    for node in operations:
        node.name = names.create_name(re.sub(r"(_\d+)+$", "", node.name), node)
    (results,) = graph.output_node().args
    for spec, result in zip(program.graph_signature.output_specs, list(results), strict=True):  # type: ignore[arg-type]
        if isinstance(result, fx.Node):
            spec.arg.name = result.name
