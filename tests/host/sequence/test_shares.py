"""Ranks that have no tokens of a stream compute nothing for it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pytest
import sequence
import torch
from torch import fx

from asyncdiff.graph.capture import Captured, capture
from asyncdiff.graph.signature import parse
from asyncdiff.partition.shards import Shards, shards
from asyncdiff.sequence.nodes import operation
from asyncdiff.sequence.shares import Decide, Shares, even, joint

CPU = torch.device("cpu")


def by_length(segments: Sequence[int], ranks: int, fixed: Mapping[int, int]) -> Shares:
    """Of tiny denoisers what a rank computes at least is nearly all."""
    return joint(segments, ranks, {})


def _programs(parts: Shards) -> list[fx.GraphModule]:
    return [parts.program(rank, CPU) for rank in range(len(parts.components))]


def _of_text(captured: Captured, program: fx.GraphModule) -> int:
    """How many of a program's operations are in modules of the text alone."""
    paths = [captured.module_path(n) for n in program.graph.nodes if n.op == "call_function"]
    names = ("context", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    return sum(any(name in path for name in names) for path in paths)


@pytest.mark.parametrize(
    "name, ranks, with_text",
    [("SD3", 2, [1]), ("SD3", 3, [2]), ("SD3", 4, [2, 3]), ("FLUX", 2, [0]), ("FLUX", 4, [0, 1])],
)
def test_text_is_on_few_ranks(name: str, ranks: int, with_text: list[int]) -> None:
    """Of 24 tokens 8 are text, which comes first in FLUX and last in SD3."""
    captured, _, _ = sequence.of_family(name)
    parts = shards(captured, ranks, decide=by_length)
    programs = _programs(parts)
    found = [_of_text(captured, program) for program in programs]
    assert [rank for rank in range(ranks) if found[rank]] == with_text
    # Others have as many tokens, but none of its weights.
    for component, program in zip(parts.components, programs, strict=True):
        held = sorted(name for name, _ in program.named_buffers())
        assert held == sorted(f"w_{weight}" for weight in component.weights)
    longest = parts.sharding.longest()
    assert longest is not None
    assert {longest.local(rank, parts.shares) for rank in range(ranks)} == {24 // ranks}


def _tokens(shares: Shares, segments: Sequence[int]) -> list[tuple[int, ...]]:
    """By rank how many it has of each stream."""
    each = [[shares.of(n, rank) for n in segments] for rank in range(shares.ranks)]
    return [tuple(end - begin for begin, end in ranges) for ranges in each]


def test_it_is_known_by_the_products_of_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    captured, _, _ = sequence.of_family("SD3")
    assert _tokens(shards(captured, 2).shares, (16, 8)) == [(16, 0), (0, 8)]
    monkeypatch.setattr("asyncdiff.partition.shards._PRODUCT_MS", 0.0)
    assert _tokens(shards(captured, 2).shares, (16, 8)) == [(12, 0), (4, 8)]


@pytest.mark.parametrize(
    ("segments", "speeds", "want"),
    [
        ((100,), [1, 0.6], [(62,), (38,)]),
        ((8192,), [2, 1, 1], [(4096,), (2048,), (2048,)]),
        ((9, 90), [1, 0.5], [(9, 57), (0, 33)]),
        ((90, 9), [1, 0.5], [(66, 0), (24, 9)]),
        ((4,), [1e-3, 1], [(1,), (3,)]),  # nobody has nothing
        ((4096,), [1, 0.01], [(4055,), (41,)]),  # not even a tile
        ((512, 4096), [1, 1, 1e-9], [(512, 1791), (0, 2304), (0, 1)]),
        ((8, 8), [1, 1e-9, 1e-9], [(2, 2), (3, 3), (3, 3)]),
    ],
)
def test_ranks_have_as_much_as_their_speeds_say(
    segments: tuple[int, ...], speeds: list[float], want: list[tuple[int, ...]]
) -> None:
    assert _tokens(joint(segments, len(speeds), {}, speeds), segments) == want
    half = [s / 2 for s in speeds]
    assert joint(segments, len(speeds), {}, half) == joint(segments, len(speeds), {}, speeds)
    alike = joint(segments, len(speeds), {}, [3.0] * len(speeds))
    assert alike == joint(segments, len(speeds), {})


@pytest.mark.parametrize(
    "speeds", [[0.3, 1 / 3, 0.6, 0.1, 1], [0.7, 0.7], [0.3, 0.7, 0.8, 0.1], [1e-9, 1e9, 3]]
)
def test_every_token_is_some_ranks(speeds: list[float]) -> None:
    """Of numbers that are no sums of powers of two, too."""
    for segments in ((338,), (358,), (53, 53, 338), (512, 4239), (182, 2429, 1982), (98, 1618)):
        shares = joint(segments, len(speeds), {}, speeds)
        for n in segments:
            bounds = [shares.of(n, rank) for rank in range(len(speeds))]
            assert bounds[0][0] == 0 and bounds[-1][1] == n
            assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(bounds))
        if len(set(speeds)) == 1:
            assert shares == joint(segments, len(speeds), {})


@pytest.mark.parametrize("name", ["PixArt", "SD3"])
def test_shares_by_speed_compute_the_same(name: str) -> None:
    captured, call, (want,) = sequence.of_family(name)
    values = sequence.values(captured, call)
    parts = shards(captured, 3, speeds=[1.0, 0.5, 0.25])
    outputs, _ = sequence.run(captured, parts.sharding, parts.shares, values)
    longest = parts.sharding.longest()
    assert longest is not None
    mine = [longest.local(rank, parts.shares) for rank in range(3)]
    assert mine[0] > mine[1] > mine[2] > 0
    for (got,) in outputs:
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_even_shares_have_text_on_all_ranks() -> None:
    captured, _, _ = sequence.of_family("SD3")
    first, second = _programs(shards(captured, 2, decide=even))
    assert _of_text(captured, first) == _of_text(captured, second) > 0


def _streams(text: int, picture: int) -> tuple[Captured, list[torch.Tensor], torch.Tensor]:
    module, given = sequence.streams(), sequence.streams_call(text, picture)
    call = parse(module, (), given)
    captured = capture(module, call)
    return captured, sequence.values(captured, call), module(**given)[0]


@pytest.mark.parametrize("decide", [even, joint])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("text, picture", [(4, 8), (12, 4), (6, 6), (3, 10)])
def test_streams(text: int, picture: int, ranks: int, decide: Decide) -> None:
    """Also where the text is more than a rank's share, or as long as the picture."""
    captured, values, want = _streams(text, picture)
    parts = shards(captured, ranks, decide=decide)
    outputs, _ = sequence.run(captured, parts.sharding, parts.shares, values)
    assert [operation(n) for n in parts.sharding.unknown] == ["cdist", "cumsum"]
    for (got,) in outputs:
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_what_is_whole_on_the_only_rank_that_needs_it_is_not_exchanged() -> None:
    """Keys and values of the text's attention to itself; its queries to all tokens ask for others'
    keys, and all need it whole."""
    captured, values, _ = _streams(4, 8)
    count = {}
    for decide in (even, joint):
        parts = shards(captured, 2, decide=decide)
        _, gatherer = sequence.run(captured, parts.sharding, parts.shares, values)
        count[decide] = gatherer.count
    assert count[even] - count[joint] == 2


def test_a_rank_gives_only_what_it_has() -> None:
    """The first one has all of the text, the second one none; both meet in the same order."""
    captured, _, _ = _streams(4, 8)
    programs = _programs(shards(captured, 2, decide=by_length))
    order = []
    for program in programs:
        taken = program.graph.find_nodes(op="call_module", target="meet")
        order.append([n.args[0] for n in taken])
    given = [
        {n.args[0] for n in p.graph.find_nodes(op="call_module", target="emit")} for p in programs
    ]
    assert order[0] == order[1]
    assert given[0] > given[1]  # what cdist takes of the text
