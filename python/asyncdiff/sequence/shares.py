"""How many tokens of each stream, such as text and picture, every rank has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate


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


#: decide(segments, ranks, fixed): the shares of streams of so many tokens, which attention joins
#: in this order. ``fixed``, by length: what a rank that has any of a stream computes for it at
#: least, in tokens of the whole.
Decide = Callable[[Sequence[int], int, Mapping[int, int]], Shares]
#: Rows of a matrix that a GPU multiplies at a time: a few more take as long as all of them. Where
#: ranks have at least so many times that, shares end there.
_TILE, _TILES = 128, 8


def even(segments: Sequence[int], ranks: int, fixed: Mapping[int, int]) -> Shares:
    """As many tokens of each stream on every rank."""
    return Shares(ranks)


def joint(
    segments: Sequence[int],
    ranks: int,
    fixed: Mapping[int, int],
    speeds: Sequence[float] | None = None,
) -> Shares:
    """As much work on every rank, or as much as its speed says, by tokens of all streams together:
    a stream that is short is on few ranks, mostly on one, and others have more of the long one
    instead. A rank that would have no token at all has one; where streams of the same length leave
    it none even so, all are shared out evenly.

    A rank that has a few tokens of a stream launches all of its kernels, and these take nearly as
    long as for all tokens of a short one; so that counts. Streams of the same length are shared
    out alike.
    """
    parts = [1.0] * ranks if speeds is None else list(speeds)
    if len(segments) < 2 and len(set(parts)) == 1:
        return Shares(ranks)
    # Streams between others, or tiles, may leave a rank nothing but what is fixed.
    for least, tile in ((fixed, _TILE), ({}, _TILE), ({}, 1)):
        shares = _joint(segments, parts, least, tile)
        if all(_tokens(shares, segments, rank) for rank in range(ranks)):
            return shares
    return Shares(ranks)


def _joint(
    segments: Sequence[int], parts: Sequence[float], fixed: Mapping[int, int], tile: int
) -> Shares:
    """Work in these proportions on the ranks, with so much for a stream at least."""
    ranks, tokens, counts = len(parts), sum(segments), Counter(segments)
    # Not more than would leave to one rank nothing else.
    works = {
        n: n + max(min(fixed.get(n, 0), (tokens // times - ranks * n) // max(ranks - 1, 1)), 0)
        for n, times in counts.items()
    }
    total, before = sum(works[n] for n in segments), 0
    # Exactly: rounded, the last one may not be the total, and a token would be nobody's.
    *inner, whole = accumulate(map(Fraction, parts), initial=Fraction(0))
    exact = [*(int(total * part / whole) for part in inner), total]
    ends = [min(max(end, r), max(total - ranks + r, 0)) for r, end in enumerate(exact)]
    bounds = {}
    for length, times in counts.items():
        places = [min(max(end - before, 0) // times, length) for end in ends]
        bounds[length] = tuple(
            _at_tiles(places, length, tile) if tokens >= _TILE * _TILES * ranks else places
        )
        before += works[length] * times
    return Shares(ranks, bounds)


def _tokens(shares: Shares, segments: Sequence[int], rank: int) -> int:
    return sum(end - begin for begin, end in (shares.of(n, rank) for n in segments))


def _at_tiles(places: Sequence[int], length: int, tile: int) -> list[int]:
    """Where shares of a stream end, moved to the nearest ends of tiles."""
    return [p if p == length else min(round(p / tile) * tile, length) for p in places]
