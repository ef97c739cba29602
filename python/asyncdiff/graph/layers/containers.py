"""Objects that hold tensors, as caches of keys and values do that one call of a denoiser returns
and the next ones are given: containers like lists and dicts, once torch knows of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree


def register_containers(leaves: Iterable[Any]) -> bool:
    """Make the classes of those objects containers whose attributes, or what these hold, are
    tensors. Whether there was one."""
    found = False
    for leaf in leaves:
        if not _holds_tensors(leaf):
            continue
        if type(leaf) not in pytree.SUPPORTED_NODES:
            _register(type(leaf))
        register_containers(pytree.tree_leaves(list(vars(leaf).values())))
        found = True
    return found


def _holds_tensors(value: Any, depth: int = 4) -> bool:
    if isinstance(value, (torch.Tensor, torch.nn.Module, type)) or not hasattr(value, "__dict__"):
        return False
    inside = pytree.tree_leaves(list(vars(value).values()))
    return depth > 0 and any(
        isinstance(x, torch.Tensor) or _holds_tensors(x, depth - 1) for x in inside
    )


def _register(cls: type) -> None:
    def flatten(value: Any) -> tuple[list[Any], tuple[str, ...]]:
        return list(vars(value).values()), tuple(vars(value))

    def flatten_with_keys(value: Any) -> Any:
        pairs = [(pytree.GetAttrKey(n), x) for n, x in vars(value).items()]
        return pairs, tuple(vars(value))

    def unflatten(values: Iterable[Any], names: tuple[str, ...]) -> Any:
        made: Any = object.__new__(cls)
        vars(made).update(zip(names, values, strict=True))
        return made

    pytree.register_pytree_node(cls, flatten, unflatten, flatten_with_keys_fn=flatten_with_keys)
