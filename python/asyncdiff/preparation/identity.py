"""What a denoiser is, in a word that other processes come to as well: its layers, what they are
set to, shapes of weights, and the code that computes."""

from __future__ import annotations

import enum
import hashlib
import types
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..graph.hooks import is_code
from ..graph.layers.attention import chosen
from ..graph.state.alike import known_by_attributes
from .code import Code, word_of_tensor

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_TENSORS = (torch.Tensor, nn.Parameter, nn.Buffer)
#: Of a layer, what would run besides its forward.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: Attributes that are looked at by themselves.
_APART = ("_parameters", "_buffers", "_modules", *_HOOKS)
#: Where diffusers keeps hooks.
_REGISTRY = "_diffusers_hook"
#: So deep values are looked into.
_DEPTH = 8


class UnknownError(Exception):
    """Something on which an export may depend in a way that has no word: it is not kept."""


def of_denoiser(module: nn.Module) -> str:
    """A word for all that an export of ``module`` depends on besides its arguments and versions.
    Raises UnknownError."""
    code, seen = Code(), dict[int, int]()
    layers = [
        _of_layer(path, layer, seen, code)
        for path, layer in module.named_modules(remove_duplicate=False)
    ]
    config = getattr(module, "config", None)
    options = {k: v for k, v in config.items() if k[:1] != "_"} if isinstance(config, dict) else {}
    modes = [(type(m).__qualname__, str(getattr(m, "device", ""))) for m in _modes()]
    said = [layers, _frozen(options, code), [str(x) for x in chosen()], modes]
    said.append(str(torch.get_default_dtype()))
    return digest([*said, code.word()])


def digest(value: Any) -> str:
    """A word for nested lists and plain values."""
    return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()


def _modes() -> list[Any]:
    return list(torch.overrides._get_current_function_mode_stack())


def _of_layer(path: str, layer: nn.Module, seen: dict[int, int], code: Code) -> list[Any]:
    number = seen.setdefault(id(layer), len(seen))
    if number < len(seen) - 1:  # what stands under several names
        return [path, number]
    attributes = vars(layer)
    registry = getattr(attributes.get(_REGISTRY), "hooks", None)
    if registry or "forward" in attributes or any(attributes.get(h) for h in _HOOKS):
        raise UnknownError(f"{path} has hooks")
    code.reach(type(layer), "forward")
    weights = [
        [name, seen.setdefault(id(x), len(seen)), _of_tensor(path, x)]
        for where in (layer._parameters, layer._buffers)
        for name, x in where.items()
        if x is not None
    ]
    plain = [
        [name, _frozen(x, code)]
        for name, x in attributes.items()
        if name not in _APART and (name[:1] != "_" or _is_plain(x) or is_code(layer, name, x))
    ]
    return [path, number, weights, plain, _read_by(type(layer), code)]


def _of_tensor(path: str, x: torch.Tensor) -> list[Any]:
    if type(x) not in _TENSORS:
        raise UnknownError(f"{path} has weights of a class of their own")
    return [type(x).__name__, tuple(x.shape), x.stride(), str(x.dtype), str(x.device)]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _read_by(what: Any, code: Code) -> list[Any]:
    """What a class or function reads besides, as far as there are words for it."""
    return [_read(x, code) for x in code.surroundings.of(what)]


def _read(value: Any, code: Code) -> Any:
    try:
        return _frozen(value, code, _DEPTH // 2)
    except UnknownError:
        return None


def _frozen(value: Any, code: Code, depth: int = _DEPTH) -> Any:
    """A value as it counts; 1, 1.0 and True are three."""
    if isinstance(value, torch.Tensor):
        return word_of_tensor(value)
    if depth == 0 or isinstance(value, nn.Module):
        raise UnknownError(f"a {type(value).__name__} among the attributes of a layer")
    if isinstance(value, _PLAIN):
        return type(value).__name__, value
    if isinstance(value, (*_TORCH, enum.Enum)):
        return type(value).__name__, str(value)
    if isinstance(value, type):
        code.value(value)
        return "class", value.__module__, value.__qualname__
    # What reads more is looked into only where layers have it themselves.
    looked_into = depth > _DEPTH - 2
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
        code.value(value)
        read = _read_by(value, code) if looked_into else None
        return "function", value.__module__, value.__qualname__, read
    inside = _inside(value, code, depth - 1)
    if inside is None:
        if not known_by_attributes(value):
            raise UnknownError(f"a {type(value).__name__} among the attributes of a layer")
        code.kind(type(value))
        inside = _read_by(type(value), code) if looked_into else None
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    own = getattr(value, "__dict__", None)
    return name, inside, own and [(k, _frozen(x, code, depth - 1)) for k, x in own.items()]


def _inside(value: Any, code: Code, depth: int) -> Any:
    """What there is in a container, method or partial; None where it is none of these."""
    if isinstance(value, Mapping):
        return [(_frozen(k, code), _frozen(x, code, depth)) for k, x in value.items()]
    if isinstance(value, (list, tuple)):
        return [_frozen(x, code, depth) for x in value]
    if isinstance(value, (set, frozenset)):
        return sorted(repr(_frozen(x, code, depth)) for x in value)
    if isinstance(value, partial):
        return [_frozen(x, code, depth) for x in (value.func, value.args, value.keywords)]
    if isinstance(value, types.MethodType):
        owner = value.__self__  # a layer's own attributes are looked at anyway
        known = None if isinstance(owner, nn.Module) else _frozen(owner, code, depth)
        return [_frozen(value.__func__, code, depth), known]
    return None
