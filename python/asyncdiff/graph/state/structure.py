"""What a denoiser is made of, under names that stay when adapters are fused, switched or replaced:
its layers, weights, and the numbers among its options that may be moved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .adapters import SCALES, active, by_adapter, computing, entries

#: The attribute of an attention processor that says how much of something it adds (IP-Adapter).
_SCALE = "scale"


@dataclass(frozen=True)
class Part:
    """A layer that computes. ``adapters``: those that count of what it has by adapter; of a layer
    that adapters wrap, or of what such a layer has of them. ``wraps``: it is such a layer."""

    name: str
    layer: nn.Module
    adapters: tuple[str, ...] | None = None
    wraps: bool = False

    def children(self) -> Iterator[tuple[str, nn.Module | None, tuple[str, ...] | None]]:
        """Its submodules by name, and the adapters that count in each."""
        own = None if self.wraps else self.adapters
        for key, name, child in entries(self.layer._modules, own):
            inside = self.adapters if self.wraps and by_adapter(self.layer, key) else None
            yield name, child, inside

    def below(self, name: str) -> str:
        """The name of something of this layer."""
        return f"{self.name}.{name}" if self.name else name


@dataclass(frozen=True)
class Slot:
    """Where a number stands that may be moved: under ``key`` in ``container``, which is the
    attribute of that name among ``attributes``, or all of these."""

    name: str
    container: Any
    key: Any
    attributes: dict[str, Any]
    attribute: str = ""

    @property
    def value(self) -> float:
        """The number."""
        return float(self.container[self.key])

    def put(self, value: Any) -> None:
        """Put a value there; the container, too, if another one has taken its place."""
        self.container[self.key] = value
        if self.attribute:
            self.attributes[self.attribute] = self.container


class Structure:
    """A denoiser's layers as they are when this is made.

    ``parts`` are those that compute, each once, in order; ``shared`` names of layers that stand
    under others' names too. ``tensors`` are parameters and buffers by name, ``slots`` numbers by
    name.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parts: list[Part] = []
        self.shared: list[tuple[str, str]] = []
        self.tensors: dict[str, torch.Tensor] = {}
        self.slots: dict[str, Slot] = {}
        self._names: dict[int, str] = {}
        self._visit("", module, None)

    def name_of(self, tensor: torch.Tensor) -> str | None:
        """The name of a parameter or buffer, the first one of several; None for another tensor."""
        name = self._names.get(id(tensor))
        return name if name is not None and self.tensors[name] is tensor else None

    def _visit(self, name: str, layer: nn.Module, adapters: tuple[str, ...] | None) -> None:
        layer = computing(layer)
        known = self._names.setdefault(id(layer), name)
        if known != name:
            self.shared.append((name, known))
            return
        mine = active(layer)
        part = Part(name, layer, mine or adapters, bool(mine))
        self.parts.append(part)
        own = None if part.wraps else part.adapters
        for where in (layer._parameters, layer._buffers):
            for _, key, tensor in entries(where, own):
                if tensor is not None:
                    self.tensors[part.below(key)] = tensor
                    self._names.setdefault(id(tensor), part.below(key))
        for slot in _slots(part):
            self.slots[slot.name] = slot
        for key, child, inside in part.children():
            if child is not None:
                self._visit(part.below(key), child, inside)


def _slots(part: Part) -> Iterator[Slot]:
    if part.wraps:
        attributes = vars(part.layer)
        scales = attributes.get(SCALES)
        if isinstance(scales, dict):
            for key, name, value in entries(scales, part.adapters):
                if is_number(value):
                    yield Slot(part.below(f"{SCALES}.{name}"), scales, key, attributes, SCALES)
    processor: Any = vars(part.layer).get("processor")
    if part.name.rpartition(".")[2] == "processor":
        processor = part.layer
    attributes = getattr(processor, "__dict__", {})
    scale = attributes.get(_SCALE)
    if is_number(scale):
        yield Slot(part.below(_SCALE), attributes, _SCALE, attributes)
    elif isinstance(scale, list):
        for i, value in enumerate(scale):
            if is_number(value):
                yield Slot(part.below(f"{_SCALE}.{i}"), scale, i, attributes, _SCALE)


def is_number(value: Any) -> bool:
    """Whether a value is one that may be moved."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
