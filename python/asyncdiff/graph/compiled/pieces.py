"""A component's program cut into the pieces that are compiled: regions, and what is between them.

A boundary value leaves as soon as it exists, so the compiler must not move what computes it behind
what does not need it, nor give its memory to something else while it is pushed. So pieces end at
pushes too: a value that is pushed is an output of a piece, in memory of its own.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn
from torch.fx.node import map_arg

from ..capture import VIEW
from ..program import Emit, Meet
from ..tracing.lazy_code import uncompiled
from .regions import module_paths
from .structure import computes, structure, unlike

#: Of a region's operations, what a piece of it has at least: a smaller one is compiled with what is
#: around it.
_MOST = 0.5


@dataclass(frozen=True)
class Cut:
    """A program that calls pieces, and those that compute something, by the names of submodules,
    each with the digest of what it computes. Pieces take tensors and return tuples of them; weights
    are among what they take."""

    program: fx.GraphModule
    pieces: dict[str, str]


def cut(program: fx.GraphModule, regions: Mapping[str, int]) -> Cut:
    """``program`` in pieces: between two pushes each of the ``regions`` (see
    :func:`~.regions.repeated`) is one, and what follows on each other of the rest."""
    labels = _labels(program.graph, regions)
    parts: list[fx.Node | list[fx.Node]] = []
    for stretch in _stretches(program.graph):
        parts += [stretch] if isinstance(stretch, fx.Node) else _pieces(stretch, labels, regions)
    with uncompiled():  # pieces are compiled by inductor, nearly all of them
        return _assembled(program, parts)


def _labels(graph: fx.Graph, regions: Mapping[str, int]) -> dict[fx.Node, str]:
    """The region of every operation, '' where it is in none."""
    labels: dict[fx.Node, str] = {}
    label = ""
    for node in graph.nodes:
        if node.meta.get("nn_module_stack"):  # else it was put in later, and is where it was put
            label = next((path for path in module_paths(node) if path in regions), "")
        labels[node] = label
    return labels


def _stretches(graph: fx.Graph) -> Iterator[fx.Node | list[fx.Node]]:
    """Pushes, and all operations between two of them.

    Parts of what an operation returns stay with it, whatever is pushed between them: only tensors
    go from piece to piece.
    """
    stretch: list[fx.Node] = []
    for node in graph.nodes:
        if node.op == "call_module":
            yield from filter(None, [stretch])
            yield node
            stretch = []
        elif node.op == "call_function" and node.target is not operator.getitem:
            stretch += _with_parts(node)
    yield from filter(None, [stretch])


def _with_parts(node: fx.Node) -> list[fx.Node]:
    parts = [user for user in node.users if user.target is operator.getitem]
    return [node, *(n for part in parts for n in _with_parts(part))]


def _pieces(
    stretch: Sequence[fx.Node], labels: Mapping[fx.Node, str], regions: Mapping[str, int]
) -> Iterator[list[fx.Node]]:
    sizes = Counter(labels[node] for node in stretch if computes(node))
    large = {label for label in sizes if label and sizes[label] >= _MOST * regions[label]}
    rest: list[fx.Node] = []
    for label, run in itertools.groupby(stretch, labels.__getitem__):
        nodes = list(run)
        if label not in large:
            rest += nodes
            continue
        views = _views_for_others(nodes)
        yield from filter(None, [rest, [node for node in nodes if node not in views]])
        rest = [node for node in nodes if node in views]
    yield from filter(None, [rest])


def _views_for_others(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The views of what is computed here that are used elsewhere only. Who uses them makes them: a
    region then is like others of which nobody, or a component that makes its own, takes such."""
    found: set[fx.Node] = set()
    inside = set(nodes)
    for node in reversed(nodes):
        if VIEW in node.meta and node.target is not operator.getitem:
            whole = _with_parts(node)
            here = inside - found - {*whole}
            if here.isdisjoint(user for part in whole for user in part.users):
                found.update(whole)
    return found


def _assembled(program: fx.GraphModule, parts: Sequence[fx.Node | list[fx.Node]]) -> Cut:
    """The program that consists of these pieces and pushes."""
    root = nn.Module()
    graph = fx.Graph()
    env = {node: graph.node_copy(node) for node in program.graph.find_nodes(op="placeholder")}
    digests: dict[str, str] = {}

    def value(node: fx.Node) -> fx.Node:
        if node not in env:  # a weight, where it is used first
            env[node] = graph.get_attr(str(node.target))
            _take(root, program, node)
        return env[node]

    numbers = itertools.count()
    for part in parts:
        if isinstance(part, fx.Node):
            env[part] = graph.node_copy(part, value)
            continue
        name = f"piece_{next(numbers)}"
        piece, digest, given, results = _piece(program, part)
        root.add_module(name, piece)
        if any(map(computes, part)):
            digests[name] = digest
        called = graph.call_module(name, tuple(map(value, given)))
        for place, result in enumerate(results):
            env[result] = graph.call_function(operator.getitem, (called, place))
    graph.node_copy(program.graph.output_node(), value)
    ends = {name: end for name, end in program.named_children() if isinstance(end, (Emit, Meet))}
    for name, end in ends.items():
        root.add_module(name, end)
    made = fx.GraphModule(root, graph)
    for name, end in ends.items():  # GraphModule keeps only what its graph uses
        made.add_module(name, end)
    return Cut(made, digests)


def _piece(
    program: fx.GraphModule, nodes: Sequence[fx.Node]
) -> tuple[fx.GraphModule, str, list[fx.Node], list[fx.Node]]:
    """A piece, its digest, the values that it takes, and those that it returns."""
    inside = set(nodes)
    results = [node for node in nodes if any(user not in inside for user in node.users)]
    # The bodies of higher-order operations are no values: they are in the piece.
    digest, given = structure(
        nodes, results, lambda node: unlike() if _is_body(program, node) else ""
    )
    root = nn.Module()
    graph = fx.Graph()
    taken = [node for node in given if not _is_body(program, node)]
    env = {node: graph.placeholder(f"given_{place}") for place, node in enumerate(taken)}
    for node in given:
        if node not in env:
            env[node] = graph.get_attr(str(node.target))
            _take(root, program, node)
    for node in nodes:  # with names that are the same in all such pieces: caches go by them
        args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
        env[node] = graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
    graph.output(tuple(env[node] for node in results))
    return fx.GraphModule(root, graph), digest, taken, results


def _is_body(program: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(getattr(program, str(node.target)), nn.Module)


def _take(root: nn.Module, program: fx.GraphModule, node: fx.Node) -> None:
    """Give ``root`` the attribute of the program that a node stands for."""
    name, value = str(node.target), getattr(program, str(node.target))
    if isinstance(value, nn.Module):
        root.add_module(name, value)
    else:
        root.register_buffer(name, value, persistent=False)
