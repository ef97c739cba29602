"""How a dimension of tokens is shared out among ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass


def share(length: int, rank: int, ranks: int) -> tuple[int, int]:
    """The tokens [begin, end) of ``length`` that a rank of so many has: as even as can be."""
    return length * rank // ranks, length * (rank + 1) // ranks


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

    def local(self, rank: int, ranks: int) -> int:
        """How many tokens a rank has."""
        return sum(end - begin for begin, end in self.ranges(rank, ranks))

    def ranges(self, rank: int, ranks: int) -> list[tuple[int, int]]:
        """Where a rank's tokens lie among all of them, by segment."""
        starts = itertools.accumulate(self.segments, initial=0)
        return [
            (start + begin, start + end)
            for start, length in zip(starts, self.segments, strict=False)
            for begin, end in [share(length, rank, ranks)]
        ]

    def order(self, ranks: int) -> list[int] | None:
        """Which of all tokens come one after another where the ranks' shares do; None: all of them
        in their own order."""
        order = [
            token
            for rank in range(ranks)
            for begin, end in self.ranges(rank, ranks)
            for token in range(begin, end)
        ]
        return None if order == list(range(self.length)) else order

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
