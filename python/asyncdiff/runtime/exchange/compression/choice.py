"""What is compressed: what settings say, or where it pays."""

from __future__ import annotations

from typing import Any

from ....graph.capture import nbytes_of
from ....partition.exposure import Crossing, worth_compressing
from ....partition.links import Links
from ....partition.partition import Partition, partition
from ....partition.shards import Shards
from ....processes.team import Team
from .codec import crossing
from .sent import NOTHING_COMPRESSED, Compressed

#: Bytes of values that a device packs, and another unpacks, in a millisecond, by the kind of
#: device. Of GPUs by what SDXL's ticks took longer with fp8 where nothing was exposed either way,
#: on two H200s (benchmarks/results/links_2gpu.json), the slower of two: by the real link 0.242 ms,
#: launches included, for 149 MB of values (73.5 MiB of codes and scales); by 25 GB/s, at which
#: both ways had the same cut, 0.150 ms for 107 MB. Of a CPU's thread as measured.
PACKED_PER_MS = {"cuda": 7e8, "cpu": 5e4}


class Choice:
    """What ``how`` means (fp8, int8, auto, or None) for ranks on devices of a ``kind``."""

    def __init__(self, how: str | None, kind: str) -> None:
        self._how, self._packed_per_ms = how, PACKED_PER_MS[kind]

    def cut(self, *args: Any, links: Links, copies: int, **options: Any) -> Partition:
        """:func:`~....partition.partition.partition`, by what crosses."""
        if self._how in (None, "auto"):
            whole = partition(*args, links=links, copies=copies, **options)
            if not self._wanted(whole, links, copies):
                return whole
        return partition(*args, links=links, copies=copies, nbytes=crossing, **options)

    def crossing(self, parts: Partition, links: Links, copies: int) -> Crossing:
        """Bytes that cross of a node's value in a cut like this one."""
        return crossing if self._wanted(parts, links, copies) else nbytes_of

    def boundaries(self, parts: Partition, links: Links, copies: int, team: Team) -> Compressed:
        """Which boundaries are compressed. Collective."""
        if self._how is None or isinstance(parts, Shards) or not parts.boundaries:
            return NOTHING_COMPRESSED

        def chosen() -> list[list[int]]:
            return sorted(map(list, self._wanted(parts, links, copies)))

        found = team.by(0, "choose what is compressed", chosen)
        kind = "fp8" if self._how == "auto" else self._how
        return Compressed(frozenset((i, j) for i, j in found), kind)

    def _wanted(self, parts: Partition, links: Links, copies: int) -> frozenset[tuple[int, int]]:
        if self._how == "auto":
            return worth_compressing(parts, links, crossing, self._packed_per_ms, copies)
        return frozenset(parts.boundaries if self._how else ())
