"""A captured denoiser as plain data, and made of it again, without its weights.

Torch's own format for exported programs is no faster to read than the denoiser is to export, and
holds pickles. This one has what a captured denoiser is used for: nodes with their operations,
arguments, modules, and the shapes, strides and memory of their values.
"""

from __future__ import annotations

import base64
import math
import operator
import time
from typing import Any

import torch
from torch import fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from ..graph.capture import Captured
from ..graph.layers.quantized import plain
from ..graph.signature import Call
from ..graph.state.numbers import Guards
from ..graph.state.structure import Structure
from ..graph.writes import bits

#: Bytes of a tensor that is neither a weight nor an input, at most.
_SMALL = 16 << 20
#: Objects of torch that stand among arguments, by name.
_NAMED = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}
_GETITEM = "getitem"


class NotKeptError(Exception):
    """A graph with something that this form has no words for."""


def to_data(captured: Captured) -> dict[str, Any]:
    """A captured denoiser as what JSON can hold. Raises NotKeptError."""
    nodes = list(captured.graph.nodes)
    index = {node: i for i, node in enumerate(nodes)}
    writer = _Writer(index)
    weights = {}
    for name, tensor in captured.weights.items():
        place = captured.places.get(name)
        weights[name] = [captured.names[name], place, None if place else _values(tensor)]
    comparisons = {n: [[how, x] for how, x in c] for n, c in captured.guards.comparisons.items()}
    return {
        "nodes": [writer.node(node) for node in nodes],
        "stacks": writer.stacks,
        "weights": weights,
        "inputs": captured.inputs,
        "outputs": [writer.argument(x) for x in captured.outputs],
        "out_spec": _spec_text(captured.out_spec),
        "comparisons": comparisons,
        "frozen": sorted(captured.guards.frozen),
    }


def of_data(data: dict[str, Any], module: nn.Module, call: Call) -> Captured:
    """The captured denoiser that data are of, with the weights of ``module``. Raises ValueError,
    KeyError and the like for data that are of none, or of another one."""
    started = time.perf_counter()
    structure = Structure(module)
    graph, reader = fx.Graph(), _Reader(data["stacks"])
    for written in data["nodes"]:
        reader.node(graph, written)
    weights: dict[str, torch.Tensor] = {}
    names, places = {}, {}
    for name, (target, place, values) in data["weights"].items():
        names[name] = target
        if place is None:
            weights[name] = _tensor(values)
            continue
        places[name], slot = place, structure.slots.get(place)
        weights[name] = (
            structure.tensors[place]
            if slot is None
            else torch.tensor(slot.value, dtype=torch.float64)
        )
    guards = Guards()
    guards.frozen |= set(data["frozen"])
    for name, comparisons in data["comparisons"].items():
        guards.comparisons[name] = {(how, float(x)): None for how, x in comparisons}
    return Captured(
        graph=graph,
        root=nn.Module(),
        signature=call.signature,
        weights=weights,
        names=names,
        places=places,
        inputs={str(n): int(i) for n, i in data["inputs"].items()},
        outputs=[reader.argument(x) for x in data["outputs"]],
        out_spec=pytree.treespec_loads(data["out_spec"]),
        guards=guards,
        seconds=time.perf_counter() - started,
    )


# ---- writing -------------------------------------------------------------------------------------


class _Writer:
    def __init__(self, index: dict[fx.Node, int]) -> None:
        self._index = index
        self._memory: dict[StorageWeakRef, int] = {}
        self._stack_numbers: dict[Any, int] = {}
        #: every stack of modules once
        self.stacks: list[Any] = []

    def node(self, node: fx.Node) -> list[Any]:
        args, kwargs = self.argument(list(node.args)), self.argument(dict(node.kwargs))
        if node.op == "call_function":
            target = _target_text(node.target)
        elif node.op in ("placeholder", "output"):
            target = str(node.target)
        else:
            raise NotKeptError(f"a node of kind {node.op}")
        return [node.op, node.name, target, args, kwargs, self._value(node), self._stack(node)]

    def argument(self, x: Any) -> Any:
        if x is None or isinstance(x, (bool, int, str)):
            return x
        if isinstance(x, float):
            return x if math.isfinite(x) else {"float": repr(x)}
        if isinstance(x, fx.Node):
            return {"node": self._index[x]}
        if isinstance(x, tuple):
            return {"tuple": [self.argument(y) for y in x]}
        if isinstance(x, list):
            return [self.argument(y) for y in x]
        if isinstance(x, dict):
            return {"dict": [[str(k), self.argument(y)] for k, y in x.items()]}
        if isinstance(x, slice):
            return {"slice": [self.argument(y) for y in (x.start, x.stop, x.step)]}
        if isinstance(x, torch.device):
            return {"device": str(x)}
        for name, kind in _NAMED.items():
            if isinstance(x, kind):
                return {name: str(x).removeprefix("torch.")}
        raise NotKeptError(f"an argument that is a {type(x).__name__}")

    def _value(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            return self._shape(value)
        if isinstance(value, (list, tuple)):
            return [self._shape(x) if isinstance(x, torch.Tensor) else None for x in value]
        return None  # nobody asks for any other

    def _shape(self, x: torch.Tensor) -> dict[str, Any]:
        numbers = [*x.shape, *x.stride(), x.storage_offset()]
        if not all(type(n) is int for n in numbers):
            raise NotKeptError("a size that is no number")
        storage = x.untyped_storage()
        memory = self._memory.setdefault(StorageWeakRef(storage), len(self._memory))
        where = [x.storage_offset(), memory, storage.nbytes()]
        dtype = str(x.dtype).removeprefix("torch.")
        return {"tensor": [dtype, list(x.shape), list(x.stride()), *where]}

    def _stack(self, node: fx.Node) -> int | None:
        stack = node.meta.get("nn_module_stack")
        if not stack:
            return None
        levels = tuple((str(k), str(path), _class_text(cls)) for k, (path, cls) in stack.items())
        if levels not in self._stack_numbers:
            self._stack_numbers[levels] = len(self.stacks)
            self.stacks.append([list(level) for level in levels])
        return self._stack_numbers[levels]


def _class_text(cls: Any) -> str:
    return f"{cls.__module__}.{cls.__qualname__}" if isinstance(cls, type) else str(cls)


def _target_text(target: Any) -> str:
    if target is operator.getitem:
        return _GETITEM
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    raise NotKeptError(f"the operation {target}")


def _values(tensor: torch.Tensor) -> list[Any]:
    """A tensor by its bytes, if these are few."""
    if tensor.device.type == "meta" or tensor.nbytes > _SMALL:
        raise NotKeptError("a tensor of its own that is large, or has no values")
    content = bits(plain(tensor).contiguous()).cpu().numpy().tobytes()
    dtype = str(tensor.dtype).removeprefix("torch.")
    device = str(tensor.device)
    return [dtype, list(tensor.shape), device, base64.b64encode(content).decode()]


def _spec_text(spec: pytree.TreeSpec) -> str:
    try:
        text = pytree.treespec_dumps(spec)
        if pytree.treespec_loads(text) == spec:
            return text
    except Exception as e:  # whatever the class of a result says of that
        raise NotKeptError(f"a result that is {spec}") from e
    raise NotKeptError(f"a result that is {spec}")


# ---- reading -------------------------------------------------------------------------------------


class _Reader:
    def __init__(self, stacks: list[Any]) -> None:
        self._stacks = [{key: (path, cls) for key, path, cls in stack} for stack in stacks]
        self._nodes: list[fx.Node] = []
        self._memory: dict[int, torch.UntypedStorage] = {}
        self._targets: dict[str, Any] = {}

    def node(self, graph: fx.Graph, written: list[Any]) -> None:
        op, name, text, args, kwargs, value, stack = written
        if op not in ("call_function", "placeholder", "output"):
            raise ValueError(f"there is no node of kind {op}")
        target = self._target(text) if op == "call_function" else text
        given = tuple(self.argument(args))
        node = graph.create_node(op, target, given, self.argument(kwargs), name)
        if node.name != name:
            raise ValueError(f"there are two nodes {name}")
        if value is not None:
            node.meta["val"] = self._value(value)
        if stack is not None:
            node.meta["nn_module_stack"] = self._stacks[stack]
        self._nodes.append(node)

    def argument(self, x: Any) -> Any:
        if isinstance(x, list):
            return [self.argument(y) for y in x]
        if not isinstance(x, dict):
            return x
        ((kind, content),) = x.items()
        if kind == "node":
            return self._nodes[content]
        if kind == "float":
            return float(content)
        if kind == "tuple":
            return tuple(self.argument(y) for y in content)
        if kind == "dict":
            return {k: self.argument(y) for k, y in content}
        if kind == "slice":
            return slice(*(self.argument(y) for y in content))
        if kind == "device":
            return torch.device(content)
        found = getattr(torch, content)
        if not isinstance(found, _NAMED[kind]):
            raise ValueError(f"{content} is no {kind}")
        return found

    def _target(self, text: str) -> Any:
        if text not in self._targets:
            self._targets[text] = _operation(text)
        return self._targets[text]

    def _value(self, written: Any) -> Any:
        if isinstance(written, list):
            return [None if x is None else self._value(x) for x in written]
        dtype, shape, strides, offset, memory, nbytes = written["tensor"]
        if memory not in self._memory:
            self._memory[memory] = torch.empty(
                nbytes, dtype=torch.uint8, device="meta"
            ).untyped_storage()
        empty = torch.empty(0, dtype=getattr(torch, dtype), device="meta")
        return empty.set_(self._memory[memory], offset, shape, strides)


def _operation(text: str) -> Any:
    """An operation of torch's by its name. Raises ValueError."""
    if text == _GETITEM:
        return operator.getitem
    namespace, _, rest = text.partition(".")
    name, _, overload = rest.rpartition(".")
    found = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    if not isinstance(found, torch._ops.OpOverload):
        raise ValueError(f"{text} is no operation")
    return found


def _tensor(written: list[Any]) -> torch.Tensor:
    dtype, shape, device, content = written
    data = bytearray(base64.b64decode(content))
    kind = getattr(torch, dtype)
    if not data:
        return torch.empty(shape, dtype=kind, device=device)
    return torch.frombuffer(data, dtype=kind).reshape(shape).to(device)
