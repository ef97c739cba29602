"""Which layers of a denoiser compute the same but for the values of their weights."""

from __future__ import annotations

import contextlib
import enum
import threading
import types
import weakref
from collections import deque
from collections.abc import Hashable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from .surroundings import Surroundings

_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
#: Of which most attributes are.
_JUST_PLAIN = frozenset(_PLAIN)
_TENSORS = (torch.Tensor, nn.Parameter, nn.Buffer)
#: What would run besides a layer's forward.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: Where diffusers keeps hooks.
_REGISTRY = "_diffusers_hook"
#: Attributes that are looked at by themselves, or do not count.
_APART = frozenset(("_parameters", "_buffers", "_modules", "forward", _REGISTRY, *_HOOKS))
#: What every module has; most of it is empty.
_OWN = frozenset(vars(nn.Module()))
#: So deep values are looked into.
_DEPTH = 6


class _Plain:
    """An object with attributes and nothing else."""


def known_by_attributes(value: Any) -> bool:
    """Whether its attributes are all that there is in an object. Functions and iterators have more,
    which Python does not tell, and so have objects with slots."""
    cls = type(value)
    if isinstance(value, (type, nn.Module, torch.Tensor)) or not hasattr(value, "__dict__"):
        return False
    slots = any(vars(base).get("__slots__") for base in cls.__mro__)
    return not slots and cls.__basicsize__ <= _Plain.__basicsize__


def storage(x: torch.Tensor) -> int:
    """The memory in which a tensor lies."""
    return x.untyped_storage()._cdata


class UnlikeError(Exception):
    """A layer that is like no other one: it has hooks, or weights of a class of their own."""


class Kinds:
    """Numbers for what layers have alike that compute the same with the same weights: classes,
    attributes, shapes and dtypes of weights, of all their parts, which of these weights are the
    same, and what code of a user's reads besides. What is not known is alike only where it is the
    same object."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._around = Surroundings()
        #: the memory of tensors that the layer looked at last has, or knows of
        self.memory: set[int] = set()

    def of(self, layer: nn.Module) -> int | None:
        """A layer's number, as it is now; None for one that is like no other."""
        self.memory = set()
        try:
            return self._number((self._of(layer), _shared(layer)))
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
                number = found[path[:-1]] = self._number((self._own(layer), tuple(parts)))
        return number

    def _of(self, layer: nn.Module) -> int:
        parts = [
            (name, None if part is None else self._of(part))
            for name, part in layer._modules.items()
        ]
        return self._number((self._own(layer), tuple(parts)))

    def _number(self, what: Hashable) -> int:
        return self._numbers.setdefault(what, len(self._numbers))

    def _own(self, layer: nn.Module) -> Hashable:
        attributes = vars(layer)
        hooks = getattr(attributes.get(_REGISTRY), "hooks", None)
        if hooks or any(attributes.get(name) for name in _HOOKS):
            raise UnlikeError
        weights = tuple(
            (name, None if x is None else self._of_weight(x))
            for where in (layer._parameters, layer._buffers)
            for name, x in where.items()
        )
        plain = tuple(
            (name, self._frozen(x))
            for name, x in attributes.items()
            if name not in _APART and not (name in _OWN and not x)
        )
        return type(layer), type(layer).forward, weights, plain, self._read_by(type(layer))

    def _of_weight(self, x: torch.Tensor) -> Hashable:
        if type(x) not in _TENSORS and not isinstance(x, torch._subclasses.FakeTensor):
            raise UnlikeError
        self._knows(x)
        return tuple(x.shape), x.stride(), x.dtype, x.device

    def _read_by(self, code: Any) -> Hashable:
        return tuple(map(self._read, self._around.of(code)))

    def _read(self, value: Any) -> Hashable:
        try:
            return self._frozen(value, _DEPTH - 1)
        except UnlikeError:
            return _Itself(value)

    def _frozen(self, value: Any, depth: int = _DEPTH) -> Hashable:
        """A value as it counts; 1, 1.0 and True are three."""
        if type(value) in _JUST_PLAIN or isinstance(value, (*_PLAIN, enum.Enum)):
            return type(value), value
        if isinstance(value, weakref.ref):
            return _Itself(value), self._frozen(value(), 0)
        if isinstance(value, nn.Module):  # that may tell where it stands among others
            raise UnlikeError
        if depth > 0:
            inside = self._inside(value, depth - 1)
            if inside is not None:
                attributes = getattr(value, "__dict__", None)
                return type(value), inside, self._frozen(attributes, depth - 1)
        if isinstance(value, torch.Tensor):
            self._knows(value)
        # What reads more is looked into only where layers have it themselves.
        code = isinstance(value, types.FunctionType) and depth == _DEPTH
        return _Itself(value), self._read_by(value) if code else None

    def _inside(self, value: Any, depth: int) -> Hashable:
        """What there is in a value besides attributes; None where that is not known."""
        if isinstance(value, Mapping):
            return tuple((k, self._frozen(x, depth)) for k, x in value.items())
        if isinstance(value, (list, tuple, deque)):
            return tuple(self._frozen(x, depth) for x in value)
        if isinstance(value, (set, frozenset)):
            return frozenset(self._frozen(x, depth) for x in value)
        if isinstance(value, ContextVar):
            return _Itself(value), self._frozen(value.get(None), depth)
        if isinstance(value, threading.local):
            return ()
        if known_by_attributes(value):  # an attention processor
            return self._read_by(type(value)) if depth == _DEPTH - 1 else ()
        return None

    def _knows(self, x: torch.Tensor) -> None:
        if x.layout is torch.strided:
            self.memory.add(storage(x))


class _Itself:
    """What is equal to the same object only, which stays, so that its address is nobody else's."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other._value is self._value

    def __hash__(self) -> int:
        return id(self._value)


def _shared(layer: nn.Module) -> Hashable:
    """Which of a layer's weights are the same."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(x), i) for i, (_, x) in enumerate(weights_in(layer)))


def weights_in(layer: nn.Module, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers of a layer and its parts by name, each as often as it stands there:
    what torch has for that walks through all parts twice, each through all above it."""
    for where in (layer._parameters, layer._buffers):
        for name, x in where.items():
            if x is not None:
                yield path + name, x
    for name, part in layer._modules.items():
        if part is not None:
            yield from weights_in(part, f"{path}{name}.")
