"""A rank's part of a sequence-parallel denoiser as a module: what it gives to the others leaves it
as soon as it exists, what it takes from them comes in when it is needed.

Each place where ranks meet is a *meeting*: at attention its keys and values, at the end the result.
What a meeting needs is computed before all else, so that the rest of a block, such as its queries,
or its feed-forward layer where that is parallel to attention, hides the exchange.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from ..graph.capture import Captured
from ..graph.program import Emit, Meet, attribute, rehome
from .program import MEETING, program
from .sharding import Sharding
from .shares import Shares


@dataclass(frozen=True)
class _Gift:
    """What a rank brings to a meeting, as its ``index``-th value."""

    meeting: int
    index: int
    value: fx.Node


def rank_module(
    captured: Captured,
    sharding: Sharding,
    rank: int,
    shares: Shares,
    inputs: Sequence[fx.Node],
    device: torch.device,
    weight: Callable[[str, torch.device], torch.Tensor],
) -> fx.GraphModule:
    """What ``rank`` computes on ``device``, of the tokens that ``shares`` give it.

    ``forward`` takes the denoiser's tensor arguments ``inputs``, whole, and returns the list of the
    captured denoiser's outputs, whole. What it brings to meeting m, as its i-th value, is handed to
    the submodule ``emit`` as (m, i, value), and it gets what all bring from the submodule
    ``meet``, called with the same, the dimension along which they are put together and its length.
    A rank that has nothing to bring hands out nothing; at ``meet`` its value has no tokens.
    ``weight`` brings a weight, by placeholder name, to the device.
    """
    graph = program(captured, sharding, rank, shares, _gather)
    return _Assembly(captured, graph, rank, device, weight).build([n.name for n in inputs])


def _gather(local: torch.Tensor, dim: int) -> torch.Tensor:
    """Marks in a graph where all ranks' values are put together: of one rank alone its own are."""
    return local


class _Assembly:
    """Makes a module of a rank's graph."""

    def __init__(
        self,
        captured: Captured,
        graph: fx.Graph,
        rank: int,
        device: torch.device,
        weight: Callable[[str, torch.device], torch.Tensor],
    ) -> None:
        self._captured, self._device, self._weight = captured, device, weight
        self._source, self._rank = graph, rank
        self._root, self._graph = nn.Module(), fx.Graph()
        self._ends = {"emit": Emit(), "meet": Meet()}
        for name, end in self._ends.items():
            self._root.add_module(name, end)
        self._made: dict[fx.Node, fx.Node] = {}
        self._position = {node: i for i, node in enumerate(graph.nodes)}
        #: of the captured graph, weights and bodies of higher-order operations
        self._origins = {n.name: n for n in captured.graph.nodes if n.op != "call_function"}

    def build(self, inputs: Sequence[str]) -> fx.GraphModule:
        places = {n.name: n for n in self._source.find_nodes(op="placeholder")}
        for name in inputs:
            place = places[name]
            self._made[place] = self._graph.placeholder(name)
            self._made[place].meta |= {k: v for k, v in place.meta.items() if k != "val"}
        for step in self._steps():
            if isinstance(step, fx.Node):
                self._copy(step)
            else:
                value = self._made[step.value]
                self._graph.call_module("emit", (step.meeting, step.index, value))
        (outputs,) = self._source.output_node().args
        self._graph.output(fx.map_arg(list(outputs), self._made.__getitem__))  # type: ignore[arg-type]
        module = fx.GraphModule(self._root, self._graph)
        for name, end in self._ends.items():  # GraphModule keeps only what its graph uses
            module.add_module(name, end)
        return module

    def _steps(self) -> Iterator[fx.Node | _Gift]:
        """The operations in the order in which they are to be run; a gift where it leaves."""
        operations = [n for n in self._source.nodes if n.op == "call_function"]
        gathers = (n for n in operations if n.target is _gather)
        # All that is given at a meeting is given by the same ranks.
        groups = itertools.groupby(
            gathers, lambda n: (n.meta[MEETING].taker, n.meta[MEETING].givers)
        )
        done: set[fx.Node] = set()
        at = 0
        for number, (_, group) in enumerate(groups):
            together = list(group)
            self._numbers = {g: (number, i) for i, g in enumerate(together)}
            gives = self._rank in together[0].meta[MEETING].givers
            for i, gather in enumerate(together if gives else ()):
                value = gather.all_input_nodes[0]
                for node in self._behind(value, done):
                    done.add(node)
                    yield node
                yield _Gift(number, i, value)
            end = self._position[together[-1]] + 1
            while at < len(operations) and self._position[operations[at]] < end:
                if operations[at] not in done:
                    done.add(operations[at])
                    yield operations[at]
                at += 1
        yield from (node for node in operations[at:] if node not in done)

    def _behind(self, end: fx.Node, done: set[fx.Node]) -> list[fx.Node]:
        """The operations that are not done yet and that ``end`` needs, and itself, in order."""
        found: set[fx.Node] = set()
        stack = [end]
        while stack:
            node = stack.pop()
            if node.op == "call_function" and node not in done and node not in found:
                found.add(node)
                stack += node.all_input_nodes
        return sorted(found, key=self._position.__getitem__)

    def _copy(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source not in self._made:
                self._made[source] = attribute(
                    self._captured,
                    self._origins[source.name],
                    self._root,
                    self._graph,
                    self._device,
                    self._weight,
                )
        if node.target is _gather:
            local, dim = node.args
            number, index = self._numbers[node]
            length = node.meta[MEETING].length
            value = self._made[local]  # type: ignore[index]
            made = self._graph.call_module("meet", (number, index, value, dim, length))
        else:
            args, kwargs = rehome((node.args, node.kwargs), self._device)
            args, kwargs = fx.map_arg((args, kwargs), self._made.__getitem__)
            made = self._graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
            made.meta |= node.meta
        self._made[node] = made
