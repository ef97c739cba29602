"""Which layers of a denoiser compute the same but for the values of their weights."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import nn

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_TENSORS = (torch.Tensor, nn.Parameter, nn.Buffer)
#: What would run besides a layer's forward.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: Where diffusers keeps hooks.
_REGISTRY = "_diffusers_hook"
#: Attributes that are looked at by themselves, or do not count.
_APART = ("_parameters", "_buffers", "_modules", "forward", _REGISTRY, *_HOOKS)


class UnlikeError(Exception):
    """A layer that is like no other one: it has hooks, or weights of a class of their own."""


class Kinds:
    """Numbers for what layers have alike that compute the same with the same weights: classes,
    attributes, shapes and dtypes of weights, of all their parts. What is not known is alike only
    where it is the same object."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}

    def of(self, layer: nn.Module) -> int | None:
        """A layer's number, as it is now; None for one that is like no other."""
        try:
            return self._of(layer)
        except (UnlikeError, TypeError):  # something that has no hash
            return None

    def of_parts(self, module: nn.Module) -> dict[str, int]:
        """The numbers of all layers in ``module`` that may be like others, by path."""
        found: dict[str, int] = {}
        self._visit(module, "", found)
        return found

    def _visit(self, layer: nn.Module, path: str, found: dict[str, int]) -> int | None:
        parts = [
            (name, None if part is None else self._visit(part, f"{path}{name}.", found))
            for name, part in layer._modules.items()
        ]
        known = all(number is not None or layer._modules[name] is None for name, number in parts)
        number = None
        if known:
            with contextlib.suppress(UnlikeError, TypeError):
                number = found[path[:-1]] = self._number((_of(layer), tuple(parts)))
        return number

    def _of(self, layer: nn.Module) -> int:
        parts = [
            (name, None if part is None else self._of(part))
            for name, part in layer._modules.items()
        ]
        return self._number((_of(layer), tuple(parts)))

    def _number(self, what: Hashable) -> int:
        return self._numbers.setdefault(what, len(self._numbers))


def _of(layer: nn.Module) -> Hashable:
    attributes = vars(layer)
    hooks = getattr(attributes.get(_REGISTRY), "hooks", None)
    if hooks or any(attributes.get(name) for name in _HOOKS):
        raise UnlikeError
    weights = tuple(
        (name, None if x is None else _of_weight(x))
        for where in (layer._parameters, layer._buffers)
        for name, x in where.items()
    )
    plain = tuple((name, _frozen(x)) for name, x in attributes.items() if name not in _APART)
    return type(layer), type(layer).forward, weights, plain


def _of_weight(x: torch.Tensor) -> Hashable:
    if type(x) not in _TENSORS and not isinstance(x, torch._subclasses.FakeTensor):
        raise UnlikeError
    return tuple(x.shape), x.stride(), x.dtype, x.device


def _frozen(value: Any, depth: int = 6) -> Hashable:
    """A value as it counts; 1, 1.0 and True are three."""
    if isinstance(value, (*_PLAIN, *_TORCH, enum.Enum)):
        return type(value), value
    if depth > 0:
        if isinstance(value, Mapping):
            return type(value), tuple((k, _frozen(x, depth - 1)) for k, x in value.items())
        if isinstance(value, (list, tuple)):
            return type(value), tuple(_frozen(x, depth - 1) for x in value)
        if isinstance(value, (set, frozenset)):
            return type(value), frozenset(_frozen(x, depth - 1) for x in value)
        if not isinstance(value, (type, nn.Module, torch.Tensor)) and hasattr(value, "__dict__"):
            return type(value), _frozen(vars(value), depth - 1)  # an attention processor
    return object, id(value)
