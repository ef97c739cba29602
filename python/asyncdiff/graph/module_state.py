"""What a denoiser's forward depends on besides its arguments and the values of its weights.

Options of a pipeline may change it between generations: the scale of an adapter, FreeU, layers that
are loaded later. A captured graph has all of it frozen in.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch import nn

from .hooks import hooks_of, is_own
from .layers.attention import chosen

#: So many states are known again.
_KNOWN = 8


class ModuleState:
    """The submodules of a denoiser, their classes and hooks, which tensors are their weights, and
    the plain values among the attributes of these and of their attention processors; and what is
    chosen for attention beside them."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._layers: list[nn.Module] = []
        self._classes: list[tuple[type, Any]] = []
        self._copies: list[tuple[Any, Any]] = []
        self._attention: tuple[Any, ...] = ()
        #: their numbers, and what they consist of, so that its addresses are nobody else's
        self._known: dict[Any, tuple[int, Any]] = {}
        self._unused = itertools.count(1)
        self._number = 0

    def number(self) -> int:
        """Another one for every state. Quick as long as nothing changes."""
        if not self._unchanged():
            self._layers = list(self._module.modules())
            self._classes = _classes(self._layers)
            self._copies = [(x, x.copy()) for child in self._layers for x in _containers(child)]
            self._attention = chosen()
            state = (*self._attention, *self._classes, *(_frozen(x) for x, _ in self._copies))
            if state not in self._known:
                self._known[state] = next(self._unused), self._copies
                if len(self._known) > _KNOWN:
                    del self._known[next(iter(self._known))]
            self._number, _ = self._known[state]
        return self._number

    def _unchanged(self) -> bool:
        try:
            # Identity first, for each value.
            return bool(self._layers) and (
                all(now == then for now, then in self._copies)
                and _classes(self._layers) == self._classes
                and chosen() == self._attention
            )
        except (RuntimeError, ValueError):  # other tensors, which have no truth
            return False


def _classes(layers: list[nn.Module]) -> list[tuple[type, Any]]:
    """The classes of layers, and their forwards, which may be exchanged too."""
    return [(type(x), type(x).forward) for x in layers]


def _containers(layer: nn.Module) -> Iterator[Any]:
    """All dictionaries and lists in which something of a layer's state may be exchanged."""
    attributes = vars(layer)
    yield attributes
    yield from (attributes["_modules"], attributes["_parameters"], attributes["_buffers"])
    yield from (layer._forward_hooks, layer._forward_pre_hooks)
    # Of its processor, where that is no submodule.
    own = getattr(attributes.get("processor"), "__dict__", {})
    if own:
        yield own
    for name, value in (*attributes.items(), *own.items()):
        if isinstance(value, list) or (isinstance(value, dict) and name[:1] != "_"):
            yield value


def _frozen(value: Any) -> Any:
    """What a state takes of a value: plain ones as they are, containers entry by entry, processors
    by type and attributes, of all else which object it is. Private attributes count where they are
    plain: some adapters are switched by such."""
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(x) for x in value)
    if _is_plain(value):
        return value
    if not isinstance(value, dict):
        return object, id(value)
    value = dict(value)
    hooked = value.pop("forward", None)
    if hooked is not None and not is_own(hooked):
        # A hook may be a new one in each call, and wraps the layer's forward anew.
        value["forward"] = hooks_of(value) or hooked
    return tuple(
        # A processor may be a new one in each call.
        (n, type(x), _frozen(getattr(x, "__dict__", {})))
        if n == "processor" and not isinstance(x, nn.Module)
        else (n, _frozen(x))
        for n, x in value.items()
        if str(n)[:1] != "_" or _is_plain(x)
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(x) for x in value)
    return value is None or isinstance(value, (bool, int, float, str))
