"""A denoiser exported with symbols for sizes, and what it is for given ones.

Exporting runs all of a denoiser's Python code; putting numbers in the place of symbols does not.
What comes of it is the graph that an export for these sizes makes, node by node, under the same
names, so that nothing else need know of symbols.
"""

from __future__ import annotations

import operator
import time
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx, nn
from torch.fx.node import map_aggregate
from torch.multiprocessing.reductions import StorageWeakRef

from ..capture import VIEW, Captured
from ..signature import Signature
from ..state.structure import Structure

_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
#: What only says of symbols what the guards say.
_CHECKS = (
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten.sym_constrain_range.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
)


_SLICE = torch.ops.aten.slice.Tensor
#: Its arguments behind the tensor that it slices, for all there is.
_WHOLE = (None, 0, 0, 2**63 - 1, 1)


class UnfitError(Exception):
    """Sizes that a graph with symbols is not right for."""


@dataclass
class Twin:
    """An export without symbols: what one with symbols has to come to at the same sizes."""

    signature: Signature
    graph: fx.Graph
    root: nn.Module
    constants: dict[str, torch.Tensor]

    @classmethod
    def of(cls, captured: Captured) -> Twin:
        """That of a captured denoiser, of whose weights it holds none."""
        constants = {n: w for n, w in captured.weights.items() if n not in captured.places}
        return cls(captured.signature, captured.graph, captured.root, constants)


class Resizable:
    """``captured`` with symbols, whose weights it lets go of."""

    def __init__(self, captured: Captured) -> None:
        captured.let_go()
        self._captured = captured
        self._placeholders = {n.name: n for n in captured.graph.find_nodes(op="placeholder")}
        shapes = [t for n in self._placeholders.values() for t in (n.meta.get("val"),)]
        numbers = [s for t in shapes if isinstance(t, torch.Tensor) for s in t.shape]
        symbols: list[Any] = [s for s in numbers if isinstance(s, torch.SymInt)]
        environment = symbols[0].node.shape_env if symbols else None
        if environment is None:
            raise UnfitError("the exporter took every size for a number")
        self._guards = [environment.replace(guard.expr) for guard in environment.guards]
        self._ranges = dict(environment.var_to_range)

    def at(self, signature: Signature, structure: Structure, twin: Twin) -> Captured:
        """The captured denoiser for calls of this signature, with the weights of ``structure`` and
        the names that nodes of its twin have. Raises UnfitError where it is not right for
        their sizes."""
        started = time.perf_counter()
        captured = self._captured
        numbers = _Numbers(self._bound(signature))
        graph, root = fx.Graph(), nn.Module()
        copy = _Copy(numbers, captured.root, root, twin.graph)
        env = copy.nodes(captured.graph, graph, twin.root)
        if any(env[node].name != name for name, node in self._placeholders.items()):
            raise UnfitError("inputs come in another order")
        own = captured.places
        weights = {
            n: w.clone() if n in own and not w.dim() else w for n, w in captured.weights.items()
        }
        made = Captured(
            graph=graph,
            root=root,
            signature=signature,
            weights=weights,
            names=dict(captured.names),
            places=dict(captured.places),
            inputs=dict(captured.inputs),
            outputs=list(graph.find_nodes(op="output")[0].args[0]),
            out_spec=captured.out_spec,
            guards=captured.guards,
            seconds=0.0,
        )
        made.follow(structure)
        made.seconds = time.perf_counter() - started
        return made

    def _bound(self, signature: Signature) -> dict[Any, int]:
        """Symbols by their numbers for a call."""
        found: dict[Any, int] = {}
        todo = []
        for name, index in self._captured.inputs.items():
            shape = self._placeholders[name].meta["val"].shape
            for size, number in zip(shape, signature.inputs[index].shape, strict=True):
                symbol = size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
                if symbol.is_Symbol:
                    found.setdefault(symbol, number)
                todo.append((symbol, number))
        at = {symbol: sympy.Integer(number) for symbol, number in found.items()}
        if any(expression.xreplace(at) != number for expression, number in todo):
            raise UnfitError("a size that is not open is another one")
        for symbol, number in at.items():
            bounds = self._ranges.get(symbol)
            if bounds is not None and not bounds.lower <= number <= bounds.upper:
                raise UnfitError(f"{number} is not in {bounds}")
        for guard in self._guards:
            if guard.xreplace(at) not in (True, sympy.true):
                raise UnfitError(f"{guard} does not hold")
        return found


class _Numbers:
    """Numbers for symbols, and tensors with numbers for sizes."""

    def __init__(self, found: dict[Any, int]) -> None:
        self._at = {symbol: sympy.Integer(number) for symbol, number in found.items()}
        self._known: dict[Any, Any] = {}
        self._memory: dict[StorageWeakRef, torch.UntypedStorage] = {}

    def of(self, value: Any) -> Any:
        """The number that a symbol stands for; any other value as it is."""
        if not isinstance(value, _SYMBOLS):
            return value
        expression = value.node.expr
        if expression not in self._known:
            number = expression.xreplace(self._at)
            if number.free_symbols:
                raise UnfitError(f"{expression} depends on values")
            kind = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}[type(value)]
            self._known[expression] = kind(number)
        return self._known[expression]

    def tensor(self, value: Any) -> Any:
        """A tensor on the meta device like an example, in memory that is shared as it is there."""
        if isinstance(value, (list, tuple)):
            return [self.tensor(x) for x in value]
        if not isinstance(value, torch.Tensor):
            return self.of(value)
        storage = value.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference not in self._memory:
            nbytes = self.of(storage.nbytes())
            made = torch.empty(nbytes, dtype=torch.uint8, device="meta")
            self._memory[reference] = made.untyped_storage()
        shape, strides = [self.of(s) for s in value.shape], [self.of(s) for s in value.stride()]
        empty = torch.empty(0, dtype=value.dtype, device="meta")
        return empty.set_(self._memory[reference], self.of(value.storage_offset()), shape, strides)


class _Copy:
    """Copies a graph with numbers in the place of symbols, and bodies of operations from ``source``
    into ``root``; its nodes get the names of those of ``twin``, which stand in the same order."""

    def __init__(
        self, numbers: _Numbers, source: nn.Module, root: nn.Module, twin: fx.Graph
    ) -> None:
        self._numbers, self._source, self._root = numbers, source, root
        self._twins = list(twin.nodes)
        self._made: list[fx.Node] = []
        #: of operations with a body, which of their results are the twin's
        self._orders: dict[Any, list[int]] = {}

    def nodes(self, graph: fx.Graph, into: fx.Graph, bodies: nn.Module) -> dict[fx.Node, Any]:
        """Copy ``graph``; what its nodes became: nodes, or numbers. ``bodies``: the twin's."""
        env: dict[fx.Node, Any] = {}

        def given(x: Any) -> Any:
            return map_aggregate(x, lambda a: env[a] if isinstance(a, fx.Node) else a)

        for node in graph.nodes:
            value = node.meta.get("val")
            counted = node.op == "call_function" and isinstance(value, (int, float))
            if counted or isinstance(value, _SYMBOLS):
                env[node] = self._numbers.of(value)
                continue
            if node.target in _CHECKS:
                continue
            args, kwargs = given(node.args), given(node.kwargs)
            shown: Any = None if value is None else self._numbers.tensor(value)
            twin = self._twin(node)
            if node.target is _SLICE and node.target is not twin.target:
                if not _same_place(args[0].meta["val"], shown):
                    raise UnfitError("a slice is one of a part")
                env[node] = args[0]  # of all that there is, which is left out where that is known
                continue
            if (node.op, node.target) != (twin.op, twin.target) and node.op == "call_function":
                raise UnfitError(f"{node.target} stands where {twin.target} did")
            target = node.target
            if target is _SLICE:  # as it is written where sizes are numbers
                args = (*args, *_WHOLE[len(args) :])[: len(twin.args)]
                args = tuple(d if x is None else x for x, d in zip(args, _WHOLE, strict=False))
            elif target is operator.getitem and node.args[0] in self._orders:
                args = args[0], self._orders[node.args[0]].index(args[1])
            if node.op == "placeholder":
                target = twin.target
            elif node.op == "get_attr":
                target = twin.target
                self._root.add_module(str(target), self._source.get_submodule(str(node.target)))
            elif isinstance(target, torch._ops.HigherOrderOperator):
                args, order = self._open(node, args, bodies)
                self._orders[node] = order
                shown = [shown[i] for i in order]
            env[node] = made = into.create_node(node.op, target, args, kwargs, twin.name)
            made.meta = {k: x for k, x in node.meta.items() if k not in ("val", VIEW)}
            if shown is not None:
                made.meta["val"] = shown
            self._made.append(made)
        if len(self._made) != len(self._twins):
            raise UnfitError("there are fewer operations")
        return env

    def _twin(self, node: fx.Node) -> fx.Node:
        if len(self._made) == len(self._twins):
            raise UnfitError(f"{node.target} stands where there was nothing")
        return self._twins[len(self._made)]

    def _open(
        self, node: fx.Node, args: tuple[Any, ...], bodies: nn.Module
    ) -> tuple[tuple[Any, ...], list[int]]:
        """The arguments of an operation with a body that takes no numbers: these are put into the
        body; and which of its results are the twin's, in its order."""
        bodied = {i: a for i, a in enumerate(node.args) if isinstance(a, fx.Node)}
        bodied = {i: a for i, a in bodied.items() if a.op == "get_attr"}
        if len(bodied) != 1:
            raise UnfitError(f"{node.target} has several bodies")
        ((place, inside),) = bodied.items()
        body = self._source.get_submodule(str(inside.target))
        name = str(args[place].target)
        twin = bodies.get_submodule(name)
        assert isinstance(body, fx.GraphModule) and isinstance(twin, fx.GraphModule)
        graph, inner = fx.Graph(), nn.Module()
        _Copy(self._numbers, body, inner, twin.graph).nodes(body.graph, graph, twin)
        (end,), (other,) = (g.find_nodes(op="output") for g in (graph, twin.graph))
        theirs = [str(x) for x in other.args[0]]
        results = {str(x): (i, x) for i, x in enumerate(end.args[0]) if isinstance(x, fx.Node)}
        if sorted(results) != sorted(theirs):
            raise UnfitError(f"{node.target} has other results")
        end.args = (type(other.args[0])(results[x][1] for x in theirs),)
        order = [results[x][0] for x in theirs]
        self._root.add_module(name, fx.GraphModule(inner, graph))
        given = zip(args[place + 1 :], body.graph.find_nodes(op="placeholder"), strict=True)
        left = [x for x, taken in given if not isinstance(taken.meta.get("val"), _SYMBOLS)]
        return (*args[: place + 1], *left), order


def _same_place(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors that share memory have the same of it."""
    return (x.shape, x.stride(), x.storage_offset()) == (y.shape, y.stride(), y.storage_offset())


def equal(captured: Captured, twin: Twin) -> bool:
    """Whether a captured denoiser is what its twin is: operations, arguments, shapes, strides, and
    which of them share memory."""
    mine = {n: w for n, w in captured.weights.items() if n not in captured.places}
    if mine.keys() != twin.constants.keys() or not all(
        _same_values(w, twin.constants[n]) for n, w in mine.items()
    ):
        return False
    return _same_graphs(captured.graph, captured.root, twin.graph, twin.root)


def _same_graphs(a: fx.Graph, a_root: nn.Module, b: fx.Graph, b_root: nn.Module) -> bool:
    mine, others = list(a.nodes), list(b.nodes)
    if len(mine) != len(others):
        return False
    pairs = dict(zip(mine, others, strict=True))
    memory: dict[StorageWeakRef, StorageWeakRef] = {}

    def same(x: Any, y: Any) -> bool:
        if isinstance(x, fx.Node):
            return pairs.get(x) is y
        if isinstance(x, (list, tuple)):
            return (
                isinstance(y, (list, tuple))
                and len(x) == len(y)
                and all(same(p, q) for p, q in zip(x, y, strict=True))
            )
        if isinstance(x, torch.Tensor):
            return isinstance(y, torch.Tensor) and _same_shapes(x, y, memory)
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(same(v, y[k]) for k, v in x.items())
        return type(x) is type(y) and bool(x == y)

    for node, other in pairs.items():
        if node.op == "get_attr":
            bodies = [r.get_submodule(str(n.target)) for r, n in ((a_root, node), (b_root, other))]
            one, two = bodies
            if not isinstance(one, fx.GraphModule) or not isinstance(two, fx.GraphModule):
                return False
            if not _same_graphs(one.graph, one, two.graph, two):
                return False
        elif (node.op, node.target) != (other.op, other.target):
            return False
        if node.op != "get_attr" and not (
            same(node.args, other.args)
            and same(dict(node.kwargs), dict(other.kwargs))
            and same(node.meta.get("val"), other.meta.get("val"))
        ):
            return False
    return True


def _same_shapes(
    x: torch.Tensor, y: torch.Tensor, memory: dict[StorageWeakRef, StorageWeakRef]
) -> bool:
    a, b = (StorageWeakRef(t.untyped_storage()) for t in (x, y))
    return memory.setdefault(a, b) == b and (
        (x.dtype, x.shape, x.stride(), x.storage_offset())
        == (y.dtype, y.shape, y.stride(), y.storage_offset())
    )


def _same_values(x: torch.Tensor, y: torch.Tensor) -> bool:
    if x is y:
        return True
    if x.device != y.device or x.dtype != y.dtype or x.shape != y.shape:
        return False
    return x.device.type != "meta" and torch.equal(x, y)
