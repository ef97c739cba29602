"""What a stretch of a graph computes, as text that is equal where only names and weights differ."""

from __future__ import annotations

import hashlib
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from ..capture import VIEW

#: Constants whose ``repr`` says all of them.
_PLAIN = (
    *(type(None), bool, int, float, complex, str),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
_unlike = itertools.count()


class Structure(NamedTuple):
    """A digest of what nodes compute, and the values from elsewhere that they take, in the order
    in which the digest counts them."""

    digest: str
    given: list[fx.Node]


def structure(
    nodes: Sequence[fx.Node], results: Sequence[fx.Node], describe: Callable[[fx.Node], str]
) -> Structure:
    """The structure of ``nodes``: their operations, constants and which uses which, in order, and
    which of them are ``results``.

    Values from elsewhere count by their place in the order of use, and by what ``describe`` says of
    them. What cannot be compared, an object among the arguments say, is like nothing else.
    """
    inside = {node: number for number, node in enumerate(nodes)}
    given: dict[fx.Node, int] = {}
    said: list[str] = []

    def text(x: Any) -> str:
        if isinstance(x, fx.Node):
            if x in inside:
                return f"%{inside[x]}"
            if x not in given:
                given[x] = len(given)
                said.append(f"${given[x]}: {describe(x)}")
            return f"${given[x]}"
        if isinstance(x, (tuple, list)):
            return f"{type(x).__name__}({','.join(map(text, x))})"
        if isinstance(x, dict):
            return f"{{{','.join(f'{text(k)}={text(v)}' for k, v in x.items())}}}"
        if isinstance(x, slice):
            return f"slice({text((x.start, x.stop, x.step))})"
        return f"{type(x).__name__}:{x!r}" if isinstance(x, _PLAIN) else unlike()

    for node in nodes:
        said.append(f"{_operation(node)}{text((node.args, node.kwargs))}")
    said.append(",".join(str(inside[node]) for node in results))
    return Structure(hashlib.sha256("\n".join(said).encode()).hexdigest(), list(given))


def unlike() -> str:
    """What nothing else is described as."""
    return f"unlike anything: {next(_unlike)}"


def computes(node: fx.Node) -> bool:
    """Whether a node makes a value: it is no view, and no part of what another one returns."""
    made = node.op == "call_function" and node.target is not operator.getitem
    return made and VIEW not in node.meta


def _operation(node: fx.Node) -> str:
    if node.op != "call_function":
        return unlike()
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
        return str(node.target)
    name = getattr(node.target, "__qualname__", "<")
    return unlike() if "<" in name else f"{getattr(node.target, '__module__', '')}.{name}"
