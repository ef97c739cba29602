"""Numbers among a denoiser's options as inputs of its graph: scales of adapters, which users move
from picture to picture.

While a denoiser is exported an object stands in the place of each. What it is multiplied by becomes
a product with a tensor, into which other values are written later. What it is compared with is
kept: the graph is right for values with the same answers. What else is asked of it freezes it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .structure import Slot

#: Of a number by its name: what it was compared with, and how.
Comparisons = dict[tuple[str, float], None]
#: Half precision, in which the product with a plain number is rounded once.
_HALF = (torch.float16, torch.bfloat16)
_TIMES = ("mul", "__mul__", "__rmul__", "multiply")


class FrozenError(Exception):
    """More was asked of numbers than a graph can have as an input; ``names`` are theirs."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(f"{', '.join(sorted(names))} cannot be an input of the graph")
        self.names = names


class Guards:
    """What graphs have been made for: answers to comparisons of numbers, or the numbers themselves,
    of those that are frozen."""

    def __init__(self) -> None:
        self.comparisons: dict[str, Comparisons] = {}
        self.frozen: set[str] = set()

    def learn(self, other: Guards) -> bool:
        """Take those of another graph, too; whether any were new."""
        new = not other.frozen <= self.frozen
        self.frozen |= other.frozen
        for name, found in other.comparisons.items():
            mine = self.comparisons.setdefault(name, {})
            new = new or not found.keys() <= mine.keys()
            mine.update(found)
        return new

    def of(self, name: str, value: float) -> Any:
        """What tells values apart that graphs are different for."""
        if name in self.frozen:
            return value
        asked = self.comparisons.get(name, {})
        return tuple(getattr(operator, how)(value, than) for how, than in asked)


class Number:
    """Stands for a number while a denoiser is exported. ``tensor``: its value, float64, without
    dimensions. ``names``: of the numbers that it was made of."""

    def __init__(
        self,
        value: float,
        tensor: Any,
        names: frozenset[str],
        compared: Comparisons | None = None,
        made: tuple[tuple[Any, Any], ...] = (),
    ) -> None:
        self.value, self.tensor, self.names = value, tensor, names
        self._compared = compared
        #: of a product its factors, each with the other one
        self._made = made

    def _freeze(self, *args: Any) -> Any:
        raise FrozenError(self.names)

    # ---- products ----------------------------------------------------------------------------

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, torch.Tensor):
            return self._scaled(other)
        return self._combined(operator.mul, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        for factor, rest in self._made:
            if factor is other:  # it was scaled for one call
                return rest
        return self._combined(operator.truediv, other)

    def _combined(self, operation: Callable[[Any, Any], Any], other: Any) -> Number:
        names, value, tensor = self.names, other, other
        if isinstance(other, Number):
            names, value, tensor = names | other.names, other.value, other.tensor
        elif not isinstance(other, (int, float)):
            self._freeze()
        made = ((other, self), (self, other)) if operation is operator.mul else ()
        result = operation(self.tensor, tensor)
        return Number(operation(self.value, value), result, names, made=made)

    def _scaled(self, x: torch.Tensor) -> torch.Tensor:
        """As a product with a plain number is computed: rounded once."""
        if not x.is_floating_point():
            self._freeze()
        if x.dtype in _HALF:
            return (x.float() * self.tensor).to(x.dtype)
        return x * self.tensor

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        mine = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Number)]
        if getattr(function, "__name__", "") in _TIMES and len(args) == 2 and not kwargs:
            x, y = args
            number, tensor = (x, y) if isinstance(x, Number) else (y, x)
            if isinstance(tensor, torch.Tensor):
                return number._scaled(tensor)
        raise FrozenError(frozenset[str]().union(*(x.names for x in mine)))

    # ---- comparisons -------------------------------------------------------------------------

    def _compare(self, how: str, than: Any) -> bool:
        if self._compared is None or not isinstance(than, (int, float)):
            self._freeze()
        assert self._compared is not None
        self._compared[how, float(than)] = None
        return bool(getattr(operator, how)(self.value, than))

    def __eq__(self, other: object) -> bool:
        return self._compare("eq", other)

    def __ne__(self, other: object) -> bool:
        return self._compare("ne", other)

    def __lt__(self, other: Any) -> bool:
        return self._compare("lt", other)

    def __le__(self, other: Any) -> bool:
        return self._compare("le", other)

    def __gt__(self, other: Any) -> bool:
        return self._compare("gt", other)

    def __ge__(self, other: Any) -> bool:
        return self._compare("ge", other)

    def __bool__(self) -> bool:
        return self._compare("ne", 0.0)

    __hash__ = None  # type: ignore[assignment]
    __float__ = __int__ = __index__ = __abs__ = __neg__ = _freeze
    __add__ = __radd__ = __sub__ = __rsub__ = __rtruediv__ = __pow__ = __rpow__ = _freeze
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = _freeze


class Argument(Number):
    """Stands for a number among the arguments, which is neither 0 nor 1."""

    def __init__(self, name: str, tensor: Any) -> None:
        super().__init__(0.5, tensor, frozenset((name,)))

    def _compare(self, how: str, than: Any) -> bool:
        if how not in ("eq", "ne") or than not in (0, 1):
            self._freeze()
        return how == "ne"


class Numbers:
    """Those of a denoiser while it is exported. ``tensors`` have their values, by name."""

    def __init__(self, slots: Iterable[Slot], frozen: Iterable[str]) -> None:
        self.guards = Guards()
        every = list(slots)
        self.guards.frozen |= {s.name for s in every} & set(frozen)
        self._slots = [s for s in every if s.name not in self.guards.frozen]
        self.tensors = {s.name: torch.tensor(s.value, dtype=torch.float64) for s in self._slots}

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Meanwhile objects stand in the places of the numbers."""
        before = [(slot, slot.container[slot.key]) for slot in self._slots]
        try:
            for slot, value in before:
                compared = self.guards.comparisons.setdefault(slot.name, {})
                names = frozenset((slot.name,))
                slot.put(Number(value, self.tensors[slot.name], names, compared))
            yield
        finally:
            # The exporter leaves copies of dictionaries and lists.
            for slot, value in before:
                slot.put(value)
