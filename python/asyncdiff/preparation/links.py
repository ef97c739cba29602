"""How fast the links between devices are, kept for other processes on the same ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..partition.links import Links, Pair
from .folder import preparations
from .identity import digest
from .key import versions

_KIND = "links"


class KeptLinks:
    """The links between ranks on GPUs of these names, in the order of ranks, of these ``pairs``;
    ``transport``: how bundles are made to travel."""

    def __init__(self, names: Sequence[str], pairs: Sequence[Pair], transport: str) -> None:
        self._pairs = sorted(pairs)
        self._folder = preparations()
        self._key = digest([list(names), transport, versions()])
        self._of = f"links between {len(names)} GPUs"

    def get(self) -> list[list[float]] | None:
        """What :meth:`Links.to_list` told of those that are known."""
        if not self._folder.usable():
            return None
        data = self._folder.read(_KIND, self._key)
        try:
            return None if data is None else self._checked(data["links"])
        except (LookupError, TypeError, ValueError, ArithmeticError) as e:  # whatever is in a file
            where = self._folder.file(_KIND, self._key)
            self._folder.say(f"a preparation on the disk is ignored, {where}: {e!r}")
            return None

    def _checked(self, kept: Sequence[Sequence[float]]) -> list[list[float]]:
        rows = [[*map(float, row)] for row in kept]
        if sorted((a, b) for a, b, _, _ in rows) != self._pairs:
            raise ValueError("it is of other pairs")
        if not all(0 < rate < math.inf and 0 <= ms < math.inf for _, _, rate, ms in rows):
            raise ValueError("no link is like that")
        return rows

    def keep(self, links: Links) -> None:
        """Keep them, if all were measured."""
        if links.pairs and sorted(links.pairs) == self._pairs and self._folder.usable():
            self._folder.write(_KIND, self._key, self._of, {"links": links.to_list()})
