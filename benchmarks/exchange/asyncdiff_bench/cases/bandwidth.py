"""Bundles back to back: in one direction, in both, and to several receivers."""

from __future__ import annotations

from collections.abc import Iterator

from ..bench import Bench, count_for, figure
from ..figures import Figure
from ..machine import Machine
from ..payload import Payload
from ..program import back_to_back, both_ways
from ..ways import Way
from .case import Case, large, sizes

_SLOTS = 4  # more than two: credits then come back before they are needed


def _one_way(bench: Bench, way: Way, payload: Payload) -> Iterator[Figure]:
    yield from _to("bandwidth", bench, way, payload, [1])


def _fan_out(bench: Bench, way: Way, payload: Payload) -> Iterator[Figure]:
    receivers = list(range(1, len(bench.world.devices)))
    yield from _to("fan-out", bench, way, payload, receivers)


def _to(
    case: str, bench: Bench, way: Way, payload: Payload, receivers: list[int]
) -> Iterator[Figure]:
    link = bench.link(way, 0, receivers, payload, _SLOTS)
    answers = [bench.signal(way, r, 0) for r in receivers]
    launch = bench.world.launches()[0]
    count = count_for(payload, launch)
    times = bench.rounds(back_to_back(link, answers, count), [link], count, launch, way)
    yield figure(
        case,
        way,
        launch,
        payload,
        "per_bundle",
        [t / count * 1e6 for t in times],
        moved=payload.nbytes * len(receivers),
        mode=getattr(link, "mode", None),
        receivers=len(receivers),
    )


def _both_ways(bench: Bench, way: Way, payload: Payload) -> Iterator[Figure]:
    there = bench.link(way, 0, [1], payload, _SLOTS)
    back = bench.link(way, 1, [0], payload, _SLOTS)
    go, answer = bench.signal(way, 0, 1), bench.signal(way, 1, 0)
    launch = bench.world.launches()[0]
    count = count_for(payload, launch)
    program = both_ways(there, back, go, answer, count)
    times = bench.rounds(program, [there, back], count, launch, way)
    yield figure(
        "bidirectional",
        way,
        launch,
        payload,
        "per_bundle",
        [t / count * 1e6 for t in times],
        moved=2 * payload.nbytes,
        mode=getattr(there, "mode", None),
    )


def _two_directions(machine: Machine, way: Way) -> str | None:
    return "a broadcast has one direction" if way.directed else None


def _several_receivers(machine: Machine, way: Way) -> str | None:
    ranks = len(machine.devices)
    if way.distributed and machine.processes < ranks:
        return f"needs {ranks} GPUs: one for each of {ranks} ranks"
    return None


ONE_WAY = Case("bandwidth", "back to back in one direction", sizes, _one_way)
BOTH_WAYS = Case(
    "bidirectional", "back to back in both directions at once", large, _both_ways, _two_directions
)
FAN_OUT = Case(
    "fan-out", "back to back from one sender to all other ranks", large, _fan_out,
    _several_receivers,
)  # fmt: skip
