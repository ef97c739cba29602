"""By how much sending outlasts computing, and where sending less would pay."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from ..graph.capture import nbytes_of
from .cost import estimate
from .links import Link, Links
from .partition import Component, Partition

#: Bytes that cross of a node's value.
Crossing = Callable[[fx.Node], int]
#: Milliseconds that compressing a boundary takes besides those for its bytes: launches on either
#: side.
_LAUNCHES = 0.03


def exposed_ms(
    parts: Partition, links: Links, crossing: Crossing = nbytes_of, copies: int = 1
) -> list[float]:
    """Of each component, by how many milliseconds its bundles leave after its last computation.

    Over ``links``, each value as soon as it exists, in the order of production. ``copies``: how
    many ranks run the last component, each of which gets its own.
    """
    count = len(parts.components)
    each = [links.from_component(i, count, copies) for i in range(count)]
    return [_exposed(parts, c, each[c.index], crossing) for c in parts.components]


def _exposed(parts: Partition, component: Component, link: Link, crossing: Crossing) -> float:
    ms = (parts.costs or estimate(parts.captured)).on(component.index)
    nbytes: dict[fx.Node, int] = {}
    for boundary in component.sends:
        for value in boundary.values:
            nbytes[value] = nbytes.get(value, 0) + crossing(value)
    left, queue, exposed = 0.0, 0.0, 0.0
    for node in reversed(component.nodes):
        if node in nbytes:
            queue += nbytes[node] / link.bytes_per_ms
            exposed = max(exposed, queue + link.latency_ms - left)
        left += ms[node] if parts.captured.each_run(node) else 0.0
    return exposed


def packing_ms(nbytes: int, packed_per_ms: float) -> float:
    """Milliseconds that compressing values of ``nbytes`` adds to a tick, ``packed_per_ms`` bytes of
    which a device packs, and another unpacks, in a millisecond."""
    return nbytes / packed_per_ms + _LAUNCHES


def worth_compressing(
    parts: Partition,
    links: Links,
    crossing: Crossing,
    packed_per_ms: float,
    copies: int = 1,
) -> frozenset[tuple[int, int]]:
    """The boundaries, by components, that would be exposed by more than compressing them costs.

    ``crossing``: what crosses of a value then; ``packed_per_ms`` as in :func:`packing_ms`.
    """
    whole = exposed_ms(parts, links, copies=copies)
    less = exposed_ms(parts, links, crossing, copies)
    found = set()
    for (i, j), boundary in parts.boundaries.items():
        if whole[i] - less[i] > packing_ms(boundary.nbytes, packed_per_ms):
            found.add((i, j))
    return frozenset(found)
