"""One way, from put to data that the consumer's next kernel sees: half of a ping-pong."""

from __future__ import annotations

from collections.abc import Iterator

from ..bench import Bench, count_for, figure
from ..figures import Figure
from ..payload import Payload
from ..program import ping_pong
from ..ways import Way
from .case import Case, bundles, sizes

_SLOTS = 2


def _measure(case: str, bench: Bench, way: Way, payload: Payload) -> Iterator[Figure]:
    there = bench.link(way, 0, [1], payload, _SLOTS)
    back = bench.link(way, 1, [0], payload, _SLOTS)
    back.echo(there)
    for launch in bench.world.launches():
        count = count_for(payload, launch)
        program = ping_pong(there, back, count)
        times = bench.rounds(program, [there, back], count, launch, way)
        us = [t / count / 2 * 1e6 for t in times]
        mode = getattr(there, "mode", None)
        yield figure(case, way, launch, payload, "one_way", us, moved=payload.nbytes, mode=mode)


def _sizes(bench: Bench, way: Way, payload: Payload) -> Iterator[Figure]:
    return _measure("latency", bench, way, payload)


def _bundles(bench: Bench, way: Way, payload: Payload) -> Iterator[Figure]:
    return _measure("bundles", bench, way, payload)


SIZES = Case(
    "latency", "one way, put to the consumer's next kernel, by size (ping-pong)", sizes, _sizes
)
BUNDLES = Case(
    "bundles", "the same for bundles of many tensors, as denoisers produce them", bundles, _bundles
)
