"""How many tokens of each stream, such as text and picture, every rank has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Shares:
    """Which tokens of a stream each of ``ranks`` ranks has, by how many there are in all: rank r
    those from the r-th of ``bounds`` to the next. Streams that are not there are shared out
    evenly."""

    ranks: int
    bounds: Mapping[int, Sequence[int]] = field(default_factory=dict)

    def of(self, length: int, rank: int) -> tuple[int, int]:
        """The tokens [begin, end) that a rank has of ``length``."""
        if length in self.bounds:
            return self.bounds[length][rank], self.bounds[length][rank + 1]
        return length * rank // self.ranks, length * (rank + 1) // self.ranks


#: decide(segments, ranks): the shares of streams of so many tokens, which attention joins in this
#: order.
Decide = Callable[[Sequence[int], int], Shares]


def even(segments: Sequence[int], ranks: int) -> Shares:
    """As many tokens of each stream on every rank."""
    return Shares(ranks)


def joint(segments: Sequence[int], ranks: int) -> Shares:
    """As many tokens on every rank, of all streams together: a stream that is short is on few
    ranks, mostly on one, and others have more of the long one instead.

    A rank that has a few tokens of a stream launches all of its kernels, and these take nearly as
    long as for all tokens of a short one. Streams of the same length are shared out alike.
    """
    total, before = sum(segments), 0
    ends = [total * rank // ranks for rank in range(ranks + 1)]
    bounds = {}
    for length, times in Counter(segments).items():
        bounds[length] = tuple(min(max(end - before, 0) // times, length) for end in ends)
        before += length * times
    return Shares(ranks, bounds)
