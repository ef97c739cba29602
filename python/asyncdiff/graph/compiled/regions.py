"""Which modules of a denoiser are compiled by themselves, because they occur more than once."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import fx

from ..capture import Captured, tensors_of
from .structure import computes, structure

#: Operations that a region has at least. Linear layers, attentions and normalisations (eight
#: operations, where they are spelled out) repeat too: by themselves they are fused with nothing.
_LEAST = 9
#: A module of which no more than this part is left without the modules that it has again is no
#: region: these are.
_MOSTLY_REPEATED = 0.6


@dataclass
class _Module:
    """One call of a module: its own nodes that every run computes, and the modules it called."""

    path: str
    nodes: list[fx.Node] = field(default_factory=list)
    parts: dict[str, _Module] = field(default_factory=dict)

    @functools.cached_property
    def size(self) -> int:
        return sum(map(computes, self.nodes))

    @functools.cached_property
    def structure(self) -> str:
        return structure(self.nodes, (), _layout).digest

    @property
    def large(self) -> list[_Module]:
        """The modules in it that may be regions."""
        return [part for part in self.parts.values() if part.size >= _LEAST]

    def inside(self) -> Iterator[_Module]:
        """The large modules in it, each once: not one that is all of another."""
        for part in self.large:
            if len(part.nodes) < len(self.nodes):
                yield part
            yield from part.inside()

    def left(self, seen: set[str]) -> int:
        """Its size without the modules that are like one ``seen`` before."""
        size = self.size
        for part in self.large:
            if part.structure in seen:
                size -= part.size
            else:
                seen.add(part.structure)
                size -= part.size - part.left(seen)
        return size


def repeated(captured: Captured) -> dict[str, int]:
    """The modules that are regions, by what their path in ``nn_module_stack`` is, with how many
    operations they have.

    They are the largest ones that occur at least twice with the same operations, constants, shapes,
    strides and dtypes. One that consists mostly of modules which are equal among themselves, as ten
    transformer blocks in a row, is none; those are.
    """
    root = _Module("")
    for node in captured.nodes:
        if not captured.each_run(node):
            continue
        module = root
        module.nodes.append(node)
        for path in module_paths(node):
            module = module.parts.setdefault(path, _Module(path))
            module.nodes.append(node)
    count = Counter(module.structure for module in root.inside())
    return dict(_chosen(root, count))


def module_paths(node: fx.Node) -> list[str]:
    """The modules in whose forward a node was made, from the denoiser's own down, as the exporter
    calls them: each call of a module that is called again has a path of its own."""
    return [entry[0] for entry in (node.meta.get("nn_module_stack") or {}).values()][1:]


def _chosen(module: _Module, count: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    for part in module.large:
        if count[part.structure] > 1 and part.left(set()) > _MOSTLY_REPEATED * part.size:
            yield part.path, part.size
        else:
            yield from _chosen(part, count)


def _layout(node: fx.Node) -> str:
    return repr([(tuple(t.shape), t.stride(), t.dtype) for t in tensors_of(node)])
