"""Tokens shared out among ranks."""

from __future__ import annotations

import pytest

from asyncdiff.sequence.axis import Axis, joined, share


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("segments", [(16,), (8, 16), (1, 5, 0, 2)])
def test_every_token_has_one_rank(segments: tuple[int, ...], ranks: int) -> None:
    axis = Axis(1, segments)
    every = [axis.ranges(rank, ranks) for rank in range(ranks)]
    tokens = [t for ranges in every for begin, end in ranges for t in range(begin, end)]
    assert sorted(tokens) == list(range(axis.length))
    assert axis.order(ranks) in (None, tokens)
    lengths = [axis.local(rank, ranks) for rank in range(ranks)]
    assert sum(lengths) == axis.length
    assert max(lengths) - min(lengths) <= len(segments)


def test_shares_are_even() -> None:
    assert [share(10, r, 4) for r in range(4)] == [(0, 2), (2, 5), (5, 7), (7, 10)]


def test_segments_part_where_they_were_joined_only() -> None:
    axis = joined(2, [(8,), (3, 5)])
    assert axis == Axis(2, (8, 3, 5))
    assert axis.cut(0, 8) == (8,)
    assert axis.cut(8, 16) == (3, 5)
    assert axis.cut(0, 0) == ()
    assert axis.cut(0, 9) is None and axis.cut(11, 8) is None


def test_one_segment_is_in_order() -> None:
    assert Axis(0, (10,)).order(3) is None
    assert Axis(0, (2, 2)).order(2) == [0, 2, 1, 3]
