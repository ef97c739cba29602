"""Which component owns which node: by measured cost, by module paths, or by given cuts."""

from __future__ import annotations

import itertools
import operator
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from ..errors import PartitionError
from ..graph.capture import Captured, nbytes_of
from .balance import cut, least
from .cost import Costs
from .links import Links
from .memory import Limits, Needs, no_room

Owners = dict[fx.Node, int]

#: By hand: one list of module paths a component. Or names of nodes where components begin.
Split = str | Sequence[str] | Sequence[Sequence[str]]


def units(captured: Captured) -> list[fx.Node]:
    """The nodes that may be owned, in order. Parts of a multi-part result follow their whole."""
    return [n for n in captured.nodes if captured.ownable(n) and n.target is not operator.getitem]


def unit_of(node: fx.Node) -> fx.Node:
    """The node that decides who owns ``node``."""
    while node.target is operator.getitem:
        node = node.all_input_nodes[0]
    return node


def balanced(
    captured: Captured,
    costs: Costs,
    components: int,
    links: Links,
    copies: int = 1,
    limits: Limits | None = None,
    crossing: Callable[[fx.Node], int] = nbytes_of,
) -> list[str]:
    """Names of the N−1 nodes at which components 1 … N−1 begin, by the exact optimum of
    :mod:`asyncdiff.balance` within ``limits`` of memory. Raises MemoryLimitError, which names the
    cut that is closest to them, where none is. ``crossing``: bytes that cross of
    a node's value."""
    owned = units(captured)
    position = {n: i for i, n in enumerate(owned)}
    last_use = list(range(len(owned)))
    nbytes = [0] * len(owned)
    carried: dict[fx.Node, set[int]] = {}  # which owned values a node is computed from
    for node in captured.nodes:
        sources = {v for s in node.all_input_nodes for v in carried.get(s, ())}
        here = position.get(unit_of(node))
        if here is not None:
            for v in sources:
                last_use[v] = max(last_use[v], here)
            nbytes[here] += crossing(node)
            sources = {here}
        carried[node] = sources
    for output in captured.outputs:
        for v in carried.get(output, ()):
            last_use[v] = len(owned)
    # Times are one table for all devices that are alike.
    tables = {id(t): _by_unit(captured, owned, t) for t in (costs.ms, *costs.each)}
    each = [tables[id(costs.on(i))] for i in range(components)] if costs.each else []
    ms = tables[id(costs.ms)]
    room: list[Any] = []
    if limits is not None and any(limit is not None for limit in limits.each):
        need = Needs(captured, owned, limits).matrix(limits)
        room = [None if limit is None else need <= limit for limit in limits.each]
    starts = cut(ms, nbytes, last_use, components, links, copies, each, room)
    if starts is None:
        assert limits is not None
        edges = [0, *least(need, limits.each), len(owned)]
        raise no_room([need[a, b] for a, b in itertools.pairwise(edges)], limits)
    return [owned[p].name for p in starts]


def _by_unit(
    captured: Captured, owned: Sequence[fx.Node], ms: Mapping[fx.Node, float]
) -> list[float]:
    decoding = _of_weights(captured, ms)
    return [ms[n] + decoding.get(n, 0.0) for n in owned]


def _of_weights(captured: Captured, ms: Mapping[fx.Node, float]) -> dict[fx.Node, float]:
    """What every run computes of weights alone, as of quantised ones, in milliseconds, by the first
    owned node that needs it."""
    waiting: dict[fx.Node, float] = {}
    found: dict[fx.Node, float] = {}
    for node in captured.nodes:
        before = sum(waiting.pop(s, 0.0) for s in node.all_input_nodes)
        if node in captured.variant and captured.ownable(unit_of(node)):
            found[unit_of(node)] = found.get(unit_of(node), 0.0) + before
        elif captured.each_run(node):
            waiting[node] = before + (0.0 if node in captured.variant else ms[node])
    return found


def by_cuts(captured: Captured, cuts: Sequence[str]) -> Owners:
    """Ownership from the names of the nodes at which components 1 … N−1 begin."""
    owned = units(captured)
    position = {n.name: i for i, n in enumerate(owned)}
    unknown = [c for c in cuts if c not in position]
    if unknown:
        raise PartitionError(
            f"split names nodes that this denoiser's graph does not have: {unknown}. Cuts hold for "
            "one denoiser at one input shape: take them from handle.partition.cuts"
        )
    starts = [position[c] for c in cuts]
    if starts != sorted(set(starts)) or (starts and starts[0] == 0):
        raise PartitionError(f"cuts must rise and leave no component empty: {list(cuts)}")
    return _with_parts(captured, {n: bisect_right(starts, i) for i, n in enumerate(owned)})


def fit(captured: Captured, cuts: Sequence[str]) -> bool:
    """Whether these cuts of another graph are cuts of this one: :func:`by_cuts` takes them."""
    try:
        by_cuts(captured, cuts)
    except PartitionError:
        return False
    return True


def by_modules(captured: Captured, split: Sequence[Sequence[str]]) -> Owners:
    """Ownership from lists of module paths, one list a component.

    The longest listed path that holds a node wins. Nodes in no listed module stay without owner:
    every component that needs their value computes it.
    """
    component = {path: i for i, paths in enumerate(split) for path in paths}
    owners: Owners = {}
    for node in units(captured):
        path = captured.module_path(node)
        while path and path not in component:
            path = path.rpartition(".")[0]
        if path:
            owners[node] = component[path]
    for i, paths in enumerate(split):
        if i not in owners.values():
            raise PartitionError(
                f"component {i} of the split owns nothing that depends on the latents: "
                f"{list(paths)}"
            )
    return _with_parts(captured, owners)


def check_split_argument(module: nn.Module, split: Split, components: int) -> None:
    """Raise PartitionError for a ``split`` that cannot fit the module and the number of parts."""
    if isinstance(split, str):
        if split not in ("auto", "estimate"):
            raise PartitionError(
                f"split={split!r}: write 'auto', 'estimate', lists of module paths, or cuts"
            )
        return
    entries = list(split)
    strings = bool(entries) and all(isinstance(s, str) for s in entries)
    if strings and components == len(entries):
        # As many strings as components: a flat list where lists of paths were meant?
        raise PartitionError(
            "split is a list with one list of module paths for each component (or "
            f"{components - 1} cuts), not {len(entries)} strings"
        )
    if (parts := len(entries) + strings) != components:
        raise PartitionError(f"split has {parts} parts, but components={components}")
    if not strings:
        _check_paths(module, entries)


def _check_paths(module: nn.Module, split: Sequence[str | Sequence[str]]) -> None:
    known = dict.fromkeys(path for path, _ in module.named_modules() if path)
    seen: dict[str, int] = {}
    for i, paths in enumerate(split):
        if isinstance(paths, str):
            raise PartitionError(
                "split is a list with one list of module paths for each component; "
                f"entry {i} is the string {paths!r}"
            )
        if not list(paths):
            raise PartitionError(f"component {i} of the split is empty")
        for path in paths:
            if path not in known:
                near = [k for k in known if k.split(".")[-1] == str(path).split(".")[-1]][:5]
                hint = f"; did you mean one of {near}?" if near else ""
                raise PartitionError(
                    f"split, component {i}: {type(module).__name__} has no module {path!r}{hint}"
                )
            if path in seen:
                raise PartitionError(
                    f"module {path!r} is listed twice: in component {seen[path]} and in {i}"
                )
            seen[path] = i
    for path, i in seen.items():
        parent = path
        while parent := parent.rpartition(".")[0]:
            if seen.get(parent, i) != i:
                raise PartitionError(
                    f"module {path!r} (component {i}) is part of {parent!r}, which component "
                    f"{seen[parent]} owns: list the parts of {parent!r} instead"
                )


def _with_parts(captured: Captured, owners: Owners) -> Owners:
    """The owners of units, and of the parts of their results."""
    return {n: owners[unit_of(n)] for n in captured.nodes if unit_of(n) in owners}
