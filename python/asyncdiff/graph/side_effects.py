"""What a call of a denoiser leaves behind besides its result.

Attention processors that record maps, or count their calls, do so once while a denoiser is
exported, with tensors that have no values, and never again.
"""

from __future__ import annotations

import collections
import contextlib
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

#: Packages whose objects keep nothing but what may be computed once.
_TRUSTED = {"torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "asyncdiff"}
#: Attributes that every module has.
_OWN = frozenset(vars(nn.Module()))
#: What the exporter says of them where a call sets one to a tensor.
_ASSIGNED = "assigned during export"
#: So many objects are looked at, from each module on.
_MOST = 10_000

#: What may be written to: where it is, its content then, how to read that and put it back, and
#: whether it is outside of the denoiser, so that a count in it is a count of calls.
_Place = tuple[str, Any, Callable[[], Any], Callable[[Any], None], bool]


class SideEffects:
    """What is within reach of a denoiser's layers, as it is when this is made."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._names = [(child, set(vars(child))) for child in module.modules()]
        self._assigned: list[str] = []
        self._inside = {id(child) for child in module.modules()}
        self._seen: set[int] = set()
        self._places: list[_Place] = []
        for path, child in module.named_modules():
            stack = [
                (f"{path}.{name}".lstrip("."), value, name == "processor")
                for name, value in vars(child).items()
                if name not in _OWN
            ]
            if _foreign(type(child)):
                stack.append((path, type(child), True))
            for _ in range(_MOST):
                if not stack:
                    break
                stack += self._visit(*stack.pop())

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Open during an export. The exporter takes away what layers keep in attributes that they
        had, and warns of it, which nobody else need hear."""
        with warnings.catch_warnings(record=True) as said:
            warnings.filterwarnings("always", f".*{_ASSIGNED}")
            try:
                yield
            finally:
                for child, names in self._names:
                    for name in set(vars(child)) - names:
                        if isinstance(vars(child)[name], torch.Tensor):
                            del vars(child)[name]
        for warning in said:
            if _ASSIGNED in str(warning.message):
                self._assigned += re.findall(r"self\.([\w.]+)", str(warning.message))
            else:
                warnings.warn_explicit(
                    warning.message, warning.category, warning.filename, warning.lineno
                )

    def found(self) -> str | None:
        """Where something was kept that a call would keep each time: a new tensor, one more entry
        of a list, another number."""
        for where in self._assigned:
            layer = self._module.get_submodule(where.rpartition(".")[0])
            if _foreign(type(layer)) or "forward" in vars(layer):
                return where
        for where, then, read, _, outside in self._places:
            now = read()
            if now is not then and _grown(now, then, outside):
                return where
        return None

    def undo(self) -> None:
        """Put back what was there."""
        for _, then, read, write, _ in self._places:
            if not _same(read(), then):
                write(then)

    def _visit(self, where: str, value: Any, outside: bool) -> Iterator[tuple[str, Any, bool]]:
        """Remember ``value`` if it can be written to; what is within reach of it."""
        if id(value) in self._seen or id(value) in self._inside:
            return
        self._seen.add(id(value))
        if isinstance(value, (dict, list, set, collections.deque)):
            read, write = value.copy, partial(_replace, value)
            self._places.append((where, value.copy(), read, write, outside))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            yield from ((f"{where}[{key!r}]", entry, outside) for key, entry in items)
        elif isinstance(value, tuple):
            yield from ((where, entry, outside) for entry in value)
        elif isinstance(value, partial):
            yield from ((where, x, outside) for x in (value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            yield from ((where, x, outside) for x in (value.__self__, value.__func__))
        elif isinstance(value, types.FunctionType):
            yield from self._of_function(where, value)
        elif isinstance(value, type):
            for base in value.__mro__:
                if _foreign(base):
                    yield from ((where, x, True) for x in vars(base).values() if callable(x))
        elif _foreign(type(value)) and hasattr(value, "__dict__"):
            yield where, type(value), True
            if not isinstance(value, nn.Module):
                read, write = vars(value).copy, partial(_replace, vars(value))
                self._places.append((where, read(), read, write, True))
            yield from (
                (f"{where}.{name}", x, True) for name, x in vars(value).items() if name not in _OWN
            )

    def _of_function(self, where: str, function: Any) -> Iterator[tuple[str, Any, bool]]:
        if not _foreign(function):
            return
        names = function.__code__.co_freevars
        for name, cell in zip(names, function.__closure__ or (), strict=True):
            read, write = partial(_content, cell), partial(setattr, cell, "cell_contents")
            self._places.append((f"{where}: {name}", read(), read, write, True))
            yield f"{where}: {name}", read(), True
        known = function.__globals__
        for name in function.__code__.co_names:
            if not isinstance(known.get(name), (types.ModuleType, type)):
                yield f"{where}: {name}", known.get(name), True


def _foreign(what: Any) -> bool:
    """Whether a class or function is a user's, of which nothing is known."""
    package = str(getattr(what, "__module__", None) or "builtins").split(".")[0]
    known = package in _TRUSTED or package in sys.stdlib_module_names
    return not known or package == "__main__"


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was assigned yet
        return None


def _replace(container: Any, content: Any) -> None:
    container.clear()
    (container.extend if hasattr(container, "extend") else container.update)(content)


def _entries(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, set):
        return [(id(x), x) for x in value]
    return list(enumerate(value)) if isinstance(value, (list, collections.deque)) else [(0, value)]


def _same(now: Any, then: Any) -> bool:
    mine, theirs = _entries(now), _entries(then)
    return len(mine) == len(theirs) and all(
        a == b and (x is y or (_is_number(x) and x == y))
        for (a, x), (b, y) in zip(mine, theirs, strict=True)
    )


def _grown(now: Any, then: Any, outside: bool) -> bool:
    before = dict(_entries(then))
    new = [(key, x) for key, x in _entries(now) if key not in before or before[key] is not x]
    if any(_has_tensor(x) for _, x in new):
        return True
    if not outside:
        return False
    longer = isinstance(now, (list, collections.deque)) and len(now) > len(then)
    return longer or any(
        _is_number(x) and _is_number(before.get(key)) and x != before[key] for key, x in new
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _has_tensor(value: Any, depth: int = 4) -> bool:
    if isinstance(value, torch.Tensor) or depth == 0:
        return isinstance(value, torch.Tensor)
    if isinstance(value, dict):
        return any(_has_tensor(x, depth - 1) for x in value.values())
    return isinstance(value, (list, tuple, set, collections.deque)) and any(
        _has_tensor(x, depth - 1) for x in value
    )
