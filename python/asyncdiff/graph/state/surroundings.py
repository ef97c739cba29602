"""What code reads besides its arguments and the attributes of its object: globals, attributes of
classes, what closures hold, and defaults, which are kept from call to call."""

from __future__ import annotations

import dis
import types
from collections.abc import Iterator
from typing import Any

from ..side_effects import foreign

_MISSING = object()
_CODE = (types.FunctionType, type, property, classmethod, staticmethod)


class Surroundings:
    """Of a user's functions, and the methods of a user's classes, what they read, and what those do
    that they call. What is in packages that are known, as diffusers, reads nothing that changes."""

    def __init__(self) -> None:
        self._places: dict[Any, list[tuple[Any, Any]]] = {}

    def of(self, code: Any) -> list[Any]:
        """The values that there are now."""
        places = self._places.get(code)
        if places is None:
            places = self._places[code] = list(_places(code)) if foreign(code) else []
        return [_value(container, key) for container, key in places]


def _value(container: Any, key: Any) -> Any:
    if not isinstance(container, types.CellType):
        return container.get(key, _MISSING)
    try:
        return container.cell_contents
    except ValueError:  # nothing was assigned yet
        return _MISSING


def _places(code: Any) -> Iterator[tuple[Any, Any]]:
    """Where ``code`` reads: a container, and the key in it, or a cell of a closure."""
    due: list[Any] = [code]
    seen = set[int]()
    while due:
        code = _inside(due.pop())
        if id(code) in seen or not foreign(code):
            continue
        seen.add(id(code))
        found = _of_class(code) if isinstance(code, type) else _of_function(code)
        for container, key in found:
            value = _value(container, key)
            if isinstance(value, _CODE):
                due.append(value)
            yield container, key


def _of_class(cls: type) -> Iterator[tuple[Any, Any]]:
    for base in cls.__mro__:
        if foreign(base):
            own = [n for n in vars(base) if n[:2] != "__" or n == "__call__"]
            yield from ((vars(base), name) for name in own)


def _of_function(function: Any) -> Iterator[tuple[Any, Any]]:
    if not isinstance(function, types.FunctionType):
        return
    defaults = {"__defaults__": function.__defaults__, "__kwdefaults__": function.__kwdefaults__}
    yield from ((defaults, name) for name in defaults)
    yield from ((cell, None) for cell in function.__closure__ or ())
    known = function.__globals__
    loaded, attributes = _names(function.__code__)
    for name in loaded:
        if name in known:
            yield known, name
            if isinstance(known[name], types.ModuleType) and foreign(known[name]):
                inside = vars(known[name])
                yield from ((inside, n) for n in attributes if n in inside)


def _names(code: types.CodeType) -> tuple[list[str], list[str]]:
    """The globals that a function names, and all that it names."""
    globals_ = [x.argval for x in dis.get_instructions(code) if x.opname == "LOAD_GLOBAL"]
    every = list(code.co_names)
    for inside in code.co_consts:
        if isinstance(inside, types.CodeType):
            more, names = _names(inside)
            globals_ += more
            every += names
    return list(dict.fromkeys(globals_)), list(dict.fromkeys(every))


def _inside(code: Any) -> Any:
    """The function in a method or property."""
    if isinstance(code, property):
        return code.fget
    return getattr(code, "__func__", code)
