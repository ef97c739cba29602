"""How fast the devices are that components run on: what nodes cost on each, and what that says."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from ..errors import InputError
from .cost import Costs


def read_speeds(given: Any) -> tuple[float, ...] | None:
    """Speeds as they are kept; None stays None. Raises InputError unless they are a list of
    positive numbers."""
    if given is None:
        return None
    try:
        # Text is a list, too: of its characters.
        speeds = () if isinstance(given, (str, bytes)) else tuple(float(s) for s in given)
    except (TypeError, ValueError):
        speeds = ()
    if not speeds or not all(0 < s < math.inf for s in speeds):
        raise InputError(
            f"speeds={given!r}: write a list with one positive number a rank, as [1, 0.6]"
        )
    return speeds


def check_entries(name: str, entries: Sequence[Any] | None, ranks: int) -> None:
    """Raise InputError unless a setting has an entry for each rank."""
    if entries is not None and len(entries) < ranks:
        raise InputError(
            f"{name} has {len(entries)} entries, and these settings have {ranks} ranks: give it "
            "one for each, in the order of devices"
        )


def runners(components: int, copies: int, places: int) -> list[list[int]]:
    """The ranks that run each component, in all groups that ``places`` have ranks for; the last
    component is run by ``copies``."""
    ranks = components + copies - 1
    groups = range(0, max(places - ranks, 0) + 1, ranks)
    last = components - 1
    return [
        [group + rank for group in groups for rank in (range(i, ranks) if i == last else (i,))]
        for i in range(components)
    ]


def on_kinds(costs: Mapping[str, Costs], first: str, runners: Sequence[Sequence[str]]) -> Costs:
    """Costs of components that run on devices of unequal kinds.

    ``costs`` are those measured on a device of each kind, ``first`` the kind whose times are told
    of nodes; ``runners`` the kinds of the devices that run each component, of which the slowest
    counts.
    """
    total = {kind: sum(c.ms.values()) for kind, c in costs.items()}
    slow = [max(kinds, key=total.__getitem__) for kinds in runners]
    told = costs[first]
    sources = list(dict.fromkeys(costs[kind].source for kind in (first, *slow)))
    each = tuple(costs[kind].ms for kind in slow)
    if len(set(slow)) == 1 and slow[0] == first:
        each = ()
    return Costs(told.ms, told.macs, "; ".join(sources), each)


def slowest(speeds: Sequence[float], runners: Sequence[Sequence[int]]) -> list[float]:
    """The speed of each component: of the ranks that run it the slowest one's."""
    return [min(speeds[rank] for rank in ranks) for ranks in runners]


def at_speeds(costs: Costs, speeds: Sequence[float], runners: Sequence[Sequence[int]]) -> Costs:
    """Costs of components whose ranks' devices are as fast as ``speeds`` say, relative to each
    other; ``costs`` are those of the first rank's. ``runners``: the ranks that run each
    component, of which the slowest counts."""
    factors = [speeds[0] / speed for speed in slowest(speeds, runners)]
    if set(factors) == {1.0}:
        return costs
    tables = {f: slower(costs.ms, f) for f in dict.fromkeys(factors)}
    each = tuple(tables[f] for f in factors)
    return dataclasses.replace(costs, source=f"{costs.source}, at given speeds", each=each)


def slower(ms: Mapping[fx.Node, float], factor: float) -> dict[fx.Node, float]:
    """Times on a device that takes ``factor`` times as long."""
    return {node: time * factor for node, time in ms.items()}


def relative(costs: Costs, components: int) -> list[float]:
    """How fast each component's device is: 1 the fastest of them."""
    totals = [sum(costs.on(i).values()) for i in range(components)]
    least = min(totals, default=0.0)
    return [round(least / total, 4) if total > 0 else 1.0 for total in totals]
