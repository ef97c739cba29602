"""What a node of an exported graph does, and to what."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

#: Whose operations are known by their names alone.
_KNOWN = ("aten", "torchao")
#: Overloads that do something else than others of their name.
_OTHERS = ("view.dtype", "where.default", "to.other")


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's value; of several, of the first."""
    value = node.meta["val"]
    if isinstance(value, (list, tuple)):
        value = value[0]
    return tuple(value.shape)


def argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    """An argument of a node, however it was given."""
    if len(node.args) > place:
        return node.args[place]
    return node.kwargs.get(name, default)


def named(node: fx.Node, name: str) -> Any:
    """An argument that overloads take at different places; None for those that do not take it."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for place, each in enumerate(node.target._schema.arguments):
        if each.name == name:
            return argument(node, place, name, each.default_value)
    return None


def wrapped(dim: int, dims: int) -> int:
    """A dimension counted from the front."""
    return dim + dims if dim < 0 else dim


def is_tensor(node: Any) -> bool:
    """Whether a node's value is a tensor, or several."""
    if not isinstance(node, fx.Node):
        return False
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) or (
        isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], torch.Tensor)
    )


def operation(node: fx.Node) -> str:
    """What a node does: the name of its operation, without its overload, but for those that do
    something else; of operations that are not torch's own, with their library's."""
    if node.target is operator.getitem:
        return "getitem"
    if not isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    library, name, overload = str(node.target).split(".")
    if library not in _KNOWN:
        return f"{library}.{name}"
    return f"{name}.{overload}" if f"{name}.{overload}" in _OTHERS else name
