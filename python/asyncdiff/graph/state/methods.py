"""The methods of layers' classes, which a user may replace: all layers of a class then compute in
another way."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from functools import cached_property
from typing import Any

from torch import nn

#: What is of all layers, and computes nothing.
_EVERYBODYS = (nn.Module, object)
_METHODS = (property, classmethod, staticmethod, cached_property)


class Methods:
    """Those of classes, and of the ones that these are derived from, as they are when this is
    made. ``held`` has them, so that their addresses are nobody else's."""

    def __init__(self, classes: Iterable[type[Any]]) -> None:
        self._classes = list(_bases(classes))
        #: attributes of each, and a copy of them
        self._now = [vars(cls) for cls in self._classes]
        self._then = [dict(attributes) for attributes in self._now]
        self.held = [x for then in self._then for x in _methods(then).values()]

    def of(self, classes: Iterable[type[Any]]) -> Hashable:
        """What tells apart the methods that some of the classes have, by their addresses."""
        mine = set(_bases(classes))
        return frozenset(
            (cls, name, id(x))
            for cls, then in zip(self._classes, self._then, strict=True)
            if cls in mine
            for name, x in _methods(then).items()
        )

    def same(self) -> bool:
        """Whether none has been replaced, added or taken away since. Raises what comparing other
        attributes raises."""
        if self._now == self._then:
            return True
        for i, (now, then) in enumerate(zip(self._now, self._then, strict=True)):
            if now != then:
                mine, before = _methods(now), _methods(then)
                if mine.keys() != before.keys() or any(mine[n] is not before[n] for n in mine):
                    return False
                self._then[i] = dict(now)  # something is counted there
        return True


def _bases(classes: Iterable[type[Any]]) -> Iterable[type[Any]]:
    """They, and what they are derived from, each once."""
    every = dict.fromkeys(base for cls in classes for base in cls.__mro__)
    return [cls for cls in every if cls not in _EVERYBODYS]


def _methods(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What of a class's attributes is code, by name."""
    return {n: x for n, x in attributes.items() if callable(x) or isinstance(x, _METHODS)}
