"""The cases that can be measured, one file for each kind. The order is that of a run."""

from __future__ import annotations

from ..errors import BenchError
from . import bandwidth, enqueue, exposed, latency
from .case import Case

CASES: tuple[Case, ...] = (
    latency.SIZES,
    latency.BUNDLES,
    enqueue.CASE,
    exposed.CASE,
    bandwidth.ONE_WAY,
    bandwidth.BOTH_WAYS,
    bandwidth.FAN_OUT,
)


def find(keys: str | None) -> list[Case]:
    """``latency,enqueue`` as cases, all where None, in the order of a run. Raises BenchError, with
    the known keys, for others."""
    if keys is None:
        return list(CASES)
    wanted = [k.strip() for k in keys.split(",")]
    known = [c.key for c in CASES]
    for key in wanted:
        if key not in known:
            raise BenchError(f"case {key!r} is unknown; known are {', '.join(known)}")
    return [c for c in CASES if c.key in wanted]
