"""Tokens shared out among ranks."""

from __future__ import annotations

import pytest

from asyncdiff.sequence.axis import Axis, joined
from asyncdiff.sequence.shares import Decide, Shares, even, joint


@pytest.mark.parametrize("decide", [even, joint])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("segments", [(16,), (8, 16), (1, 5, 0, 2), (3, 9, 9)])
def test_every_token_has_one_rank(segments: tuple[int, ...], ranks: int, decide: Decide) -> None:
    axis, shares = Axis(1, segments), decide(segments, ranks, {})
    every = [axis.ranges(rank, shares) for rank in range(ranks)]
    tokens = [t for ranges in every for begin, end in ranges for t in range(begin, end)]
    assert sorted(tokens) == list(range(axis.length))
    lengths = [axis.local(rank, shares) for rank in range(ranks)]
    assert sum(lengths) == axis.length
    assert max(lengths) - min(lengths) <= len(segments)
    assert axis.owners(shares) == tuple(rank for rank in range(ranks) if lengths[rank])


def test_even_shares() -> None:
    shares = even((10,), 4, {})
    assert [shares.of(10, r) for r in range(4)] == [(0, 2), (2, 5), (5, 7), (7, 10)]


@pytest.mark.parametrize(
    "segments, ranks, fixed, counts",
    [
        ((4096, 333), 2, 0, [[2176, 1920], [0, 333]]),  # SD3
        ((4096, 333), 2, 471, [[2432, 1664], [0, 333]]),
        ((4096, 333), 4, 471, [[1280, 1152, 1280, 384], [0, 0, 0, 333]]),
        ((512, 4096), 2, 46, [[512, 0], [1792, 2304]]),  # FLUX
        ((512, 4096), 4, 46, [[512, 0, 0, 0], [640, 1152, 1152, 1152]]),
        ((20, 12), 4, 0, [[8, 8, 4, 0], [0, 0, 4, 8]]),  # more than a rank's share
        ((20, 12), 4, 50, [[8, 8, 4, 0], [0, 0, 4, 8]]),
        ((16, 8), 2, 3, [[13, 3], [0, 8]]),
        ((16, 8), 2, 50, [[16, 0], [0, 8]]),  # nothing else is left to that rank
        ((16, 8), 3, 50, [[8, 8, 0], [0, 0, 8]]),
        ((8, 16, 16), 2, 0, [[8, 0], [6, 10], [6, 10]]),  # alike where lengths are
        ((7,), 3, 5, [[2, 2, 3]]),
    ],
)
def test_joint_shares(
    segments: tuple[int, ...], ranks: int, fixed: int, counts: list[list[int]]
) -> None:
    """As few ranks as can be have a short stream, and all have as much to do; shares of many tokens
    end where tiles of 128 rows do."""
    shares = joint(segments, ranks, {min(segments): fixed})
    bounds = [[shares.of(length, rank) for rank in range(ranks)] for length in segments]
    assert [[end - begin for begin, end in each] for each in bounds] == counts


@pytest.mark.parametrize(
    "segments, ranks",
    [((239, 11, 11), 2), ((4096, 128, 128, 128), 5), ((10, 1, 1, 10), 6), ((3098, 26, 4789), 6)],
)
def test_every_rank_has_tokens(segments: tuple[int, ...], ranks: int) -> None:
    """Whatever streams take at least: also where some are of the same length, or are between
    others, and a share moved to the end of a tile."""
    shares = joint(segments, ranks, dict.fromkeys(segments, 10**9))
    assert Axis(0, segments).owners(shares) == tuple(range(ranks))


def test_what_is_not_in_the_joint_sequence_is_shared_out_evenly() -> None:
    assert joint((4, 12), 2, {}).of(6, 1) == Shares(2).of(6, 1) == (3, 6)


def test_segments_part_where_they_were_joined_only() -> None:
    axis = joined(2, [(8,), (3, 5)])
    assert axis == Axis(2, (8, 3, 5))
    assert axis.cut(0, 8) == (8,)
    assert axis.cut(8, 16) == (3, 5)
    assert axis.cut(0, 0) == ()
    assert axis.cut(0, 9) is None and axis.cut(11, 8) is None
