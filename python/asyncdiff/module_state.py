"""What a denoiser's forward depends on besides its arguments and the values of its weights.

Options of a pipeline may change it between generations: the scale of an adapter, FreeU, layers that
are loaded later. A captured graph has all of it frozen in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


class ModuleState:
    """The submodules of a denoiser, which tensors are their weights, and the plain values among the
    attributes of these and of their attention processors."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._number = 0
        self._copies: list[tuple[Any, Any]] = []

    def number(self) -> int:
        """The same for the same state, within one process. Quick as long as nothing changes."""
        if not self._copies or not self._unchanged():
            self._copies = [(x, x.copy()) for x in _containers(self._module)]
            self._number = hash(tuple(_frozen(x) for x, _ in self._copies))
        return self._number

    def _unchanged(self) -> bool:
        try:
            return all(now == then for now, then in self._copies)  # identity first, for each value
        except (RuntimeError, ValueError):  # other tensors, which have no truth
            return False


def _containers(module: nn.Module) -> Iterator[Any]:
    """All dictionaries and lists in which something of a state may be exchanged."""
    for child in module.modules():
        attributes = vars(child)
        yield attributes
        yield from (attributes["_modules"], attributes["_parameters"], attributes["_buffers"])
        processor = attributes.get("processor")  # where it is no submodule
        own = getattr(processor, "__dict__", {})
        if own:
            yield own
        named = [*attributes.items(), *own.items()]
        yield from (x for n, x in named if n[:1] != "_" and isinstance(x, (list, dict)))


def _frozen(value: Any) -> Any:
    """What a hash takes of a value: plain ones as they are, containers entry by entry, of all else
    which object it is."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(x) for x in value)
    if isinstance(value, dict):
        return tuple((name, _frozen(x)) for name, x in value.items())
    return id(value)
