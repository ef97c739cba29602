"""What a denoiser's forward depends on besides its arguments and the values of its weights.

Options of a pipeline may change it between generations: the scale of an adapter, FreeU, layers that
are loaded later. A captured graph has all of it frozen in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

#: States that are known again. What they consist of is kept as long.
_KNOWN = 8


class ModuleState:
    """The submodules of a denoiser, their classes and hooks, which tensors are their weights, and
    the plain values among the attributes of these and of their attention processors."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._copies: list[tuple[Any, Any]] = []
        #: the submodules with their classes, and the forwards of these
        self._classes: list[tuple[nn.Module, type, Any]] = []
        self._known: dict[Any, int] = {}
        self._last = 0
        self._number = 0

    def number(self) -> int:
        """Another one for every state. Quick as long as nothing changes."""
        if not self._copies or not self._unchanged():
            self._copies = [(x, x.copy()) for x in _containers(self._module)]
            self._classes = [(x, type(x), type(x).forward) for x in self._module.modules()]
            state = tuple(_frozen(x) for x, _ in self._copies)
            state += tuple((cls, _Object(forward)) for _, cls, forward in self._classes)
            if state not in self._known:
                self._last += 1
                self._known[state] = self._last
                while len(self._known) > _KNOWN:
                    del self._known[next(iter(self._known))]
            self._number = self._known[state]
        return self._number

    def _unchanged(self) -> bool:
        try:
            # Identity first, for each value.
            return all(now == then for now, then in self._copies) and all(
                type(x) is cls and cls.forward is forward for x, cls, forward in self._classes
            )
        except (RuntimeError, ValueError):  # other tensors, which have no truth
            return False


def _containers(module: nn.Module) -> Iterator[Any]:
    """All dictionaries and lists in which something of a state may be exchanged."""
    for child in module.modules():
        attributes = vars(child)
        yield attributes
        yield from (attributes["_modules"], attributes["_parameters"], attributes["_buffers"])
        yield from (child._forward_hooks, child._forward_pre_hooks)
        processor = attributes.get("processor")  # where it is no submodule
        own = getattr(processor, "__dict__", {})
        if own:
            yield own
        for name, value in (*attributes.items(), *own.items()):
            if isinstance(value, list) or (isinstance(value, dict) and name[:1] != "_"):
                yield value


class _Object:
    """An object as itself, kept so that its address is nobody else's."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Object) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


def _frozen(value: Any) -> Any:
    """What a state takes of a value: plain ones as they are, containers entry by entry, processors
    by type and attributes, of all else which object it is. Private attributes count where they are
    plain: some adapters are switched by such."""
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(x) for x in value)
    if _is_plain(value):
        return value
    if isinstance(value, dict):
        return tuple(
            (n, _named(n, x)) for n, x in value.items() if str(n)[:1] != "_" or _is_plain(x)
        )
    return _Object(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(x) for x in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _named(name: Any, value: Any) -> Any:
    if name == "processor" and not isinstance(value, nn.Module):  # may be a new one in each call
        return type(value), _frozen(getattr(value, "__dict__", {}))
    return _frozen(value)
