"""What components take, by runs of all of them at once, while GPUs may do other work too.

What else a GPU does makes runs slower, and each as it happens to. For a moment that is no matter of
the cut; for good the GPU is slower, though it is left alone in a run now and then.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence

log = logging.getLogger("asyncdiff")

#: Runs, at least and at most.
RUNS = (3, 12)
#: Runs of a short look, at most.
LOOKS = 6
#: By so much components may take longer than their nodes say, compared with each other. On equal
#: GPUs it was 2.4 %, once 4.7 %.
OF_NODES = 1.1
#: By what share the two fastest runs of a component may differ, and others from the fastest.
_ALIKE, _NEAR = 0.01, 0.05
#: One in so many runs may be unlike the others: where these suffice, and where a device is slower.
_OF_FEW, _OF_ALL = 6, 4

#: Milliseconds of each component, by run.
Runs = Sequence[Sequence[float]]


def typical(
    run: Callable[[], Sequence[float]],
    expected: Sequence[float],
    busy: bool = False,
    look: bool = False,
) -> list[float] | None:
    """Milliseconds of each component; None where runs differ too much to say.

    ``run`` times all of them once, in ms; ``expected``: what they take by their costs, in ms.
    ``busy``: these count a device as slower for whatever else it does, so runs there will differ.
    ``look``: None, too, where a few runs do not agree.
    """
    runs: list[Sequence[float]] = []
    while not (quiet := settled(runs, expected)) and len(runs) < (LOOKS if look else RUNS[1]):
        runs.append(run())
    each = list(zip(*runs, strict=True))
    usual = [statistics.median(ms) for ms in each]
    found: list[float] | None = [min(ms) for ms in each]
    if quiet:
        why = "they agree"
    elif look:
        found, why = None, "a longer look may tell"
    elif lasting(runs, expected):
        found, why = usual, "a GPU is slower in most"
    elif busy and not _slower(usual, usual, expected):
        found, why = usual, "a GPU is as busy as before"
    elif agree(runs, expected):
        why = "the fastest agree"
    else:
        found, why = None, "they say nothing"
    told = "; ".join(" ".join(f"{t:.2f}" for t in ms) for ms in each)
    log.debug("runs of components, ms: %s: %s", told, why)
    return found


def settled(runs: Runs, expected: Sequence[float]) -> bool:
    """Whether no more runs are needed: the fastest agree, and of the others of each component at
    most one in six took much longer."""
    if len(runs) < RUNS[0] or not agree(runs, expected):
        return False
    each = zip(*runs, strict=True)
    return all(_most(ms, len(ms) // _OF_FEW) <= (1 + _NEAR) * min(ms) for ms in each)


def agree(runs: Runs, expected: Sequence[float]) -> bool:
    """Whether the two fastest runs of every component took the same time, by which no device is
    slower than is known: for that, many runs are needed."""
    each = list(zip(*runs, strict=True))
    fastest = [min(ms) for ms in each]
    alike = all(b <= (1 + _ALIKE) * a for a, b in (sorted(ms)[:2] for ms in each))
    return alike and not _slower(fastest, fastest, expected)


def lasting(runs: Runs, expected: Sequence[float]) -> bool:
    """Whether a device is slower for whatever else it does: three quarters of its component's runs
    take longer than three quarters of another one's, by more than costs of nodes could be wrong."""
    each = list(zip(*runs, strict=True))
    few = len(runs) // _OF_ALL
    return _slower([sorted(ms)[few] for ms in each], [_most(ms, few) for ms in each], expected)


def _most(ms: Sequence[float], but: int) -> float:
    """What runs take at most, but for so many."""
    return sorted(ms)[-1 - but]


def _slower(at_least: Sequence[float], at_most: Sequence[float], expected: Sequence[float]) -> bool:
    """Whether a component takes at least so much that another one, for what is expected of both,
    takes less at most."""
    slow, fast = (
        [ms / max(e, 1e-9) for ms, e in zip(times, expected, strict=True)]
        for times in (at_least, at_most)
    )
    return max(slow) > OF_NODES * min(fast)
