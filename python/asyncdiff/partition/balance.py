"""Where to cut a sequence of nodes so that the slowest component is as fast as it can be.

Exact dynamic programming over all contiguous cuts. The cost of a component is its compute time
plus the time by which pushing its boundary outlasts that compute (the *exposed* exchange).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import PartitionError
from .links import Link, Links

#: Milliseconds charged for each millisecond of exchange that is hidden behind compute: between
#: cuts that are otherwise alike, the one with fewer bytes wins.
_HIDDEN = 0.02


def cut(
    ms: Sequence[float],
    nbytes: Sequence[int],
    last_use: Sequence[int],
    components: int,
    links: Links,
    copies: int = 1,
    each: Sequence[Sequence[float]] = (),
    room: Sequence[np.ndarray | None] = (),
) -> list[int] | None:
    """Positions p_1 < … < p_{N−1}: component i owns nodes p_i … p_{i+1}−1.

    ``ms[v]`` is the time of node v, ``nbytes[v]`` the size of its value (0 if it never crosses),
    ``last_use[v]`` the position of the last node that reads it. ``copies`` is how many ranks run
    the last component: its predecessor sends all it has to each of them. (What earlier ones send
    there counts once: it leaves early.) ``links`` are those between ranks. ``each``: times of the
    nodes by component, in the place of ``ms``, where components run on unequal devices. ``room``:
    by component [a, b], whether it may have nodes a … b−1 (None: it may have any). Time O(M² N) in
    numpy for M nodes.
    None where there is no room for any cut. Raises PartitionError if there are fewer nodes than
    components.
    """
    count = len(ms)
    if components > count:
        raise PartitionError(
            f"components={components}: this denoiser can be split into at most {count}"
        )
    known: dict[tuple[int, Link], np.ndarray] = {}

    def of(index: int) -> np.ndarray:
        times = each[index] if each else ms
        link = links.from_component(index, components, copies)
        key = id(times), link
        if key not in known:
            known[key] = _segment_costs(times, nbytes, last_use, link)
        return known[key]

    by_index = [of(index) for index in range(components)]
    for index, allowed in enumerate(room):
        if allowed is not None:
            by_index[index] = np.where(allowed, by_index[index], np.inf)
    return _best(by_index)


def least(need: np.ndarray, limits: Sequence[float | None]) -> list[int]:
    """Positions of the cut under which the component that exceeds its limit most, as a share of it,
    exceeds it least; ``need[a, b]`` is what one of nodes a … b−1 needs."""
    count = len(need) - 1
    empty = np.tri(count + 1, dtype=bool)
    by_index = [np.where(empty, np.inf, need / (limit or need.max())) for limit in limits]
    return _best(by_index) or []


def _best(by_index: Sequence[np.ndarray]) -> list[int] | None:
    """Positions of the cut whose dearest component is cheapest, by [a, b], what each costs with
    nodes a … b−1; None where all are infinite."""
    count = len(by_index[0]) - 1
    best = by_index[0][0]  # best[b]: slowest component over nodes 0 … b−1 with n components
    choices = []
    for costs in by_index[1:-1]:
        worst = np.maximum(best[:, None], costs)  # [a, b]: last component is a … b−1
        choice = worst.argmin(axis=0)
        best = worst[choice, np.arange(count + 1)]
        choices.append(choice)
    if len(by_index) == 1:
        return [] if np.isfinite(best[count]) else None
    # The last one ends where all nodes do.
    worst = np.maximum(best, by_index[-1][:, count])
    end = int(worst.argmin())
    if not np.isfinite(worst[end]):
        return None
    cuts = [end]
    for choice in reversed(choices):
        end = int(choice[end])
        cuts.append(end)
    return cuts[::-1]


def _segment_costs(
    ms: Sequence[float], nbytes: Sequence[int], last_use: Sequence[int], link: Link
) -> np.ndarray:
    """[a, b]: cost of a component of nodes a … b−1; infinite where it is empty."""
    count = len(ms)
    done = np.concatenate([[0.0], np.cumsum(np.asarray(ms, dtype=np.float64))])
    size = np.asarray(nbytes, dtype=np.float64) / link.bytes_per_ms
    last = np.asarray(last_use)
    cost = np.full((count + 1, count + 1), np.inf)
    for b in range(1, count + 1):
        crossing = np.where(last[:b] >= b, size[:b], 0.0)
        # Pushes go out in order of production: from the moment v exists, it and all that come
        # after it must leave, and arrive. What is left of that when the compute ends is exposed.
        queue = np.cumsum(crossing[::-1])[::-1]
        late = np.where(crossing > 0, queue + link.latency_ms - (done[b] - done[1 : b + 1]), 0.0)
        exposed = np.maximum(np.maximum.accumulate(late[::-1])[::-1], 0.0)
        cost[:b, b] = done[b] - done[:b] + exposed + _HIDDEN * queue
    return cost
