"""What a call of a denoiser leaves behind besides its result.

Attention processors that record maps, or count their calls, do so once while a denoiser is
exported, with tensors that have no values, and never again.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import re
import sys
import types
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import CaptureError

#: Packages whose objects keep nothing but what may be computed once.
_TRUSTED = {"torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "asyncdiff"}
#: Attributes that every module has.
_OWN = frozenset(vars(nn.Module()))
#: What the exporter says of them where a call sets one to a tensor.
_ASSIGNED = "assigned during export"
_MISSING = object()
#: So many objects are looked at, from each module on.
_MOST = 10_000
#: What may be written to.
_CONTAINERS = (dict, list, set, collections.deque, types.CellType)


@contextlib.contextmanager
def refused(module: nn.Module) -> Iterator[None]:
    """Open during an export: raises CaptureError if the denoiser keeps something in each call.
    Nothing of what it kept stays."""
    effects, assigned = SideEffects(module), list[str]()
    attributes = [(child, set(vars(child))) for child in module.modules()]
    with warnings.catch_warnings():
        # The exporter takes away what layers keep in attributes that they had, and warns of it,
        # which nobody else need hear.
        warnings.filterwarnings("always", f".*{_ASSIGNED}")
        others = warnings.showwarning

        def show(message: Warning | str, *where: Any) -> None:
            if _ASSIGNED in str(message):
                assigned.extend(re.findall(r"self\.([\w.]+)", str(message)))
            else:
                others(message, *where)

        warnings.showwarning = show  # type: ignore[assignment]
        try:
            yield
        finally:
            for child, names in attributes:
                for name in vars(child).keys() - names:
                    if isinstance(vars(child)[name], torch.Tensor):
                        del vars(child)[name]
            where = next((x for x in assigned if _keeps(module, x)), None) or effects.found()
            effects.undo()
            if where and not isinstance(sys.exc_info()[1], KeyboardInterrupt):
                raise CaptureError(
                    f"{type(module).__name__} keeps something in each call ({where}), as attention "
                    "processors do that record or count: captured, it would do so once, without "
                    "values. Take that off (set_attn_processor()), or run the denoiser without "
                    "asyncdiff (restore())"
                )


@contextlib.contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Afterwards layers have the attributes that they had. The exporter leaves copies of the
    containers among them, each layer one of its own, also where layers share one."""
    before = [(child, dict(vars(child))) for child in module.modules()]
    try:
        yield
    finally:
        for child, then in before:
            for name in then.keys() - _OWN:
                if vars(child).get(name, _MISSING) is not then[name]:
                    vars(child)[name] = then[name]


class SideEffects:
    """What is within reach of a denoiser's layers, as it is when this is made."""

    def __init__(self, module: nn.Module) -> None:
        self._seen = {id(child) for child in module.modules()}
        #: where a container is, itself, what was in it, and whether it is outside of the denoiser,
        #: so that a count in it is a count of calls
        self._places: list[tuple[str, Any, dict[Any, Any], bool]] = []
        for path, child in module.named_modules():
            stack = [
                (f"{path}.{name}".lstrip("."), value, name == "processor")
                for name, value in vars(child).items()
                if name not in _OWN
            ]
            if foreign(type(child)):
                stack += _methods(path, type(child))
            for _ in range(_MOST):
                if not stack:
                    break
                stack += self._visit(*stack.pop())

    def found(self) -> str | None:
        """Where something was kept that a call would keep each time: a new tensor, one more entry
        of a list, another number."""
        for where, container, then, outside in self._places:
            now = _entries(container)
            new = [(key, x) for key, x in now.items() if key not in then or then[key] is not x]
            longer = isinstance(container, (list, collections.deque)) and len(now) > len(then)
            if any(_has_tensor(x) for _, x in new) or (
                outside and (longer or any(_counted(x, then.get(key)) for key, x in new))
            ):
                return where
        return None

    def undo(self) -> None:
        """Put back what was there."""
        for _, container, then, _ in self._places:
            now = _entries(container)
            if list(now) == list(then) and all(now[key] is then[key] for key in then):
                continue
            if isinstance(container, types.CellType):
                container.cell_contents = then[0]
                continue
            container.clear()
            if isinstance(container, (dict, set)):
                container.update(then if isinstance(container, dict) else then.values())
            else:
                container.extend(then.values())

    def _visit(self, where: str, value: Any, outside: bool) -> Iterator[tuple[str, Any, bool]]:
        """Remember ``value`` if it can be written to; what is within reach of it."""
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, _CONTAINERS):
            entries = _entries(value)
            self._places.append((where, value, entries, outside))
            for key, entry in entries.items():
                within = isinstance(value, types.CellType)
                yield where if within else f"{where}[{key!r}]", entry, outside
        elif isinstance(value, (tuple, partial, types.MethodType)):
            yield from ((where, x, outside) for x in gc.get_referents(value))
        elif isinstance(value, types.FunctionType) and foreign(value):
            code, known = value.__code__, value.__globals__
            cells = zip(code.co_freevars, value.__closure__ or (), strict=True)
            yield from ((f"{where}: {name}", cell, True) for name, cell in cells)
            for name in code.co_names:
                if not isinstance(known.get(name), (types.ModuleType, type)):
                    yield f"{where}: {name}", known.get(name), True
        elif isinstance(value, type):
            yield from _methods(where, value)
        elif foreign(type(value)) and hasattr(value, "__dict__"):
            yield from _methods(where, type(value))
            if isinstance(value, nn.Module):
                yield from (
                    (f"{where}.{n}", x, True) for n, x in vars(value).items() if n not in _OWN
                )
            else:
                yield where, vars(value), True


def _methods(where: str, cls: type) -> Iterator[tuple[str, Any, bool]]:
    for base in cls.__mro__:
        if foreign(base):
            yield from ((where, x, True) for x in vars(base).values() if callable(x))


def _keeps(module: nn.Module, where: str) -> bool:
    """Whether the attribute is one of a layer that a user made, or made other."""
    layer = module.get_submodule(where.rpartition(".")[0])
    return foreign(type(layer)) or "forward" in vars(layer)


def foreign(what: Any) -> bool:
    """Whether a class, function or module is a user's, of which nothing is known."""
    name = "__name__" if isinstance(what, types.ModuleType) else "__module__"
    package = str(getattr(what, name, None) or "builtins").split(".")[0]
    known = package in _TRUSTED or package in sys.stdlib_module_names
    return not known or package == "__main__"


def _entries(container: Any) -> dict[Any, Any]:
    """What is in a container, by key, index or, in a set, address."""
    if isinstance(container, types.CellType):
        try:
            return {0: container.cell_contents}
        except ValueError:  # nothing was assigned yet
            return {0: None}
    if isinstance(container, dict):
        return dict(container)
    if isinstance(container, set):
        return {id(x): x for x in container}
    return dict(enumerate(container))


def _counted(now: Any, then: Any) -> bool:
    """Whether a number has become another one."""
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (now, then))
    return numbers and now != then


def _has_tensor(value: Any, depth: int = 4) -> bool:
    if isinstance(value, torch.Tensor) or depth == 0:
        return isinstance(value, torch.Tensor)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple, set, collections.deque)):
        return False
    return any(_has_tensor(x, depth - 1) for x in value)
