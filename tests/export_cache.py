"""One torch.export for all denoisers that are the same but for the values of their weights.

Exporting is most of what a test on the CPU takes, and nearly all tests export the same few
structures. What an export depends on is its key here: classes with all of their functions, plain
attributes, processors, shapes and devices of weights and inputs. Whatever is not known to be
complete is exported as ever: layers and processors of a test's own, hooks, forwards of instances.
"""

from __future__ import annotations

import copy
import enum
import operator
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from asyncdiff.graph import export as exporting
from asyncdiff.graph.layers.attention import chosen
from asyncdiff.graph.tracing.lazy_code import uncompiled
from asyncdiff.integrations.diffusers.subclass import CALLS, HANDLE

#: Packages whose classes do nothing when they are called but compute.
_KNOWN = {"torch", "diffusers", "transformers", "toys"}
#: Those of a layer that would run while it is exported.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: Where diffusers keeps hooks, and leaves an empty registry once it has looked for them.
_REGISTRY = "_diffusers_hook"
#: Attributes that are looked at apart, or mean nothing for the graph.
_APART = {
    *("_parameters", "_buffers", "_modules", HANDLE, CALLS, _REGISTRY, *_HOOKS),
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
}
_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)
#: What the cache stands in for.
_EXPORT, _ONCE_EACH = torch.export.export, exporting._once_each
_CODE = (types.FunctionType, property, classmethod, staticmethod)
#: Of larger tensors among the attributes, values are no part of a key: they become inputs.
_FEW = 16


class UnknownError(Exception):
    """Something on which an export may depend in a way that is not known."""


class ExportCache:
    """``torch.export.export``, called once for each structure. Programs that were made for another
    module get this one's weights."""

    def __init__(self) -> None:
        self._export = _EXPORT
        self._programs: dict[Any, tuple[Any, set[str]]] = {}

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Stand in for torch's export, and for asyncdiff's with what is alike traced once."""
        patch.setattr(torch.export, "export", self)
        patch.setattr(exporting, "_once_each", self.once_each)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any = None, **options: Any) -> Any:
        """What ``torch.export.export`` returns, its graph free to be changed."""
        made = partial(self._export, module, args, kwargs, **options)
        with uncompiled():
            return self._exported(made, module, args, kwargs, **options)

    def once_each(self, module: nn.Module, kwargs: Any) -> Any:
        """What asyncdiff's ``_once_each`` returns, in the same way; its own exports are none that
        are known here, as layers have forwards of their own meanwhile."""
        made = partial(_ONCE_EACH, module, kwargs)
        with uncompiled():
            return self._exported(made, module, (), kwargs, strict=False)

    def _exported(
        self,
        export: Callable[[], Any],
        module: nn.Module,
        args: Any,
        kwargs: Any = None,
        **options: Any,
    ) -> Any:
        try:
            key = structure(module, args, kwargs, **options)
        except UnknownError:
            return export()
        if key not in self._programs:
            program = export()
            own = {n for n, x in program.constants.items() if _attribute(module, n) is x}
            # Its graph as it is now, and nobody's weights.
            kept = _with(program, dict.fromkeys(program.state_dict), program.constants)
            self._programs[key] = kept, own
            return program
        program, own = self._programs[key]
        weights = module.state_dict(keep_vars=True)
        constants = {
            n: _attribute(module, n) if n in own else x for n, x in program.constants.items()
        }
        return _with(program, {n: weights[n] for n in program.state_dict}, constants)


def uncached(patch: pytest.MonkeyPatch) -> None:
    """Have everything exported, also where a cache is installed."""
    patch.setattr(torch.export, "export", _EXPORT)
    patch.setattr(exporting, "_once_each", _ONCE_EACH)


def structure(module: nn.Module, args: Any, kwargs: Any = None, **options: Any) -> Any:
    """What the graph of this call depends on; raises UnknownError where that is not all known."""
    return _of_module(module), _of_inputs((args, kwargs)), _frozen(options), _modes()


def _with(program: Any, state: dict[str, Any], constants: dict[str, Any]) -> Any:
    """A program with a copy of the graph, and these tensors."""
    other = copy.copy(program)
    other._graph_module = copy.deepcopy(program.graph_module)
    other._state_dict, other._constants = state, constants
    return other


def _attribute(module: nn.Module, path: str) -> Any:
    try:
        return operator.attrgetter(path)(module)
    except AttributeError:
        return None


def _modes() -> Any:
    autocast = tuple(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return torch.get_default_dtype(), autocast, modes, chosen()


def _of_inputs(inputs: Any) -> Any:
    leaves, spec = pytree.tree_flatten(inputs)
    return str(spec), tuple(_of_tensor(x) if _is_tensor(x) else _frozen(x) for x in leaves)


def _of_module(module: nn.Module) -> Any:
    seen: dict[int, int] = {}  # what appears twice is shared
    return tuple(_of_layer(path, layer, seen) for path, layer in module.named_modules())


def _of_layer(path: str, layer: nn.Module, seen: dict[int, int]) -> Any:
    attributes = vars(layer)
    registry = getattr(attributes.get(_REGISTRY), "hooks", None)
    if registry or any(attributes[hooks] for hooks in _HOOKS):
        raise UnknownError(path)
    weights = [*layer._parameters.items(), *layer._buffers.items()]
    parts = [(name, x) for name, x in (*weights, *layer._modules.items()) if x is not None]
    shared = tuple((name, seen.setdefault(id(x), len(seen))) for name, x in parts)
    tensors = tuple(_of_tensor(x) for _, x in weights if x is not None)
    plain = tuple((n, _frozen(x)) for n, x in attributes.items() if n not in _APART)
    return path, _of_class(type(layer)), shared, tensors, plain


def _of_class(cls: type) -> Any:
    """A class by itself and by all functions and options that it has now."""
    return tuple(_of_base(base) for base in cls.__mro__[:-1] if not _is_twin(base))


def _is_twin(cls: type) -> bool:
    """Whether a class is what asyncdiff makes of its base so that hooks are not exported."""
    base = cls.__bases__[0]
    return (cls.__module__, cls.__qualname__) == (base.__module__, base.__qualname__)


def _of_base(cls: type) -> Any:
    package = cls.__module__.split(".")[0]
    if package not in _KNOWN or "<locals>" in cls.__qualname__:
        raise UnknownError(cls)
    if package == "torch":
        return cls, cls.__dict__.get("forward")
    content = tuple((n, x) for n, x in vars(cls).items() if isinstance(x, (*_CODE, *_PLAIN)))
    return cls, content


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _of_tensor(x: torch.Tensor) -> Any:
    if type(x) not in (torch.Tensor, nn.Parameter, nn.Buffer):
        raise UnknownError(x)
    return type(x), tuple(x.shape), x.stride(), x.dtype, x.device, x.requires_grad


def _frozen(value: Any, depth: int = 6) -> Any:
    """A value as it counts for a graph; 1, 1.0 and True are three."""
    if depth == 0:
        raise UnknownError(value)
    again = partial(_frozen, depth=depth - 1)
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, dict):
        return type(value), tuple((again(n), again(x)) for n, x in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(again(x) for x in value)
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(again(x) for x in value)
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)):
        return value
    if _is_tensor(value):
        few = tuple(value.flatten().tolist()) if value.numel() <= _FEW else None
        return _of_tensor(value), few
    if isinstance(value, nn.Module) or not hasattr(value, "__dict__"):
        raise UnknownError(value)
    return _of_class(type(value)), again(vars(value))
