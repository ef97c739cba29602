"""How a dimension of tokens is shared out among ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from .shares import Shares


@dataclass(frozen=True)
class Axis:
    """Dimension ``dim`` of a tensor holds tokens, ``segments`` of them one after another, and each
    rank has its share of each segment, in the same order.

    A sequence of text and one of pictures that were put together are two segments: so whichever
    rank has a token keeps it where they part again.
    """

    dim: int
    segments: tuple[int, ...]

    @property
    def length(self) -> int:
        """How many tokens all ranks have."""
        return sum(self.segments)

    def at(self, dim: int) -> Axis:
        """The same tokens along another dimension."""
        return Axis(dim, self.segments)

    def local(self, rank: int, shares: Shares) -> int:
        """How many tokens a rank has."""
        return sum(end - begin for begin, end in self.ranges(rank, shares))

    def owners(self, shares: Shares) -> tuple[int, ...]:
        """The ranks that have any of the tokens."""
        return tuple(rank for rank in range(shares.ranks) if self.local(rank, shares))

    def ranges(self, rank: int, shares: Shares) -> list[tuple[int, int]]:
        """Where a rank's tokens lie among all of them, by segment."""
        starts = itertools.accumulate(self.segments, initial=0)
        return [
            (start + begin, start + end)
            for start, length in zip(starts, self.segments, strict=False)
            for begin, end in [shares.of(length, rank)]
        ]

    def cut(self, begin: int, end: int) -> tuple[int, ...] | None:
        """The segments of tokens [begin, end); None where one of them would be cut."""
        ends = list(itertools.accumulate(self.segments, initial=0))
        if begin not in ends or end not in ends or begin > end:
            return None
        # Where segments are empty, several begin at the same token.
        first = ends.index(begin)
        last = len(ends) - 1 - ends[::-1].index(end)
        return self.segments[first:last]


def joined(dim: int, parts: Iterable[tuple[int, ...]]) -> Axis:
    """Tokens one after another."""
    return Axis(dim, tuple(itertools.chain.from_iterable(parts)))
