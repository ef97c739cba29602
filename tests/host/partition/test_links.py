"""Links as the partition knows them: by pair, with latency, shared by copies, and as kept data."""

from __future__ import annotations

from asyncdiff.partition.balance import cut
from asyncdiff.partition.links import Link, Links

CHAIN = Links(
    Link(1e9), {(0, 1): Link(2e7, 0.01), (1, 2): Link(5e6, 0.02), (2, 3): Link(3e7, 0.01)}
)


def test_each_component_sends_by_its_own_link() -> None:
    assert CHAIN.from_component(0, 4, 1) == Link(2e7, 0.01)
    assert CHAIN.from_component(1, 4, 1) == Link(5e6, 0.02)
    assert CHAIN.from_component(3, 4, 1) == Link(5e6, 0.02)  # its result, by the slowest
    # To three copies: each has a third.
    assert CHAIN.from_component(1, 3, 3) == Link(5e6 / 3, 0.02)
    assert CHAIN.from_component(0, 3, 3) == Link(2e7, 0.01)
    # Ranks 0 and 1 on one device.
    assert Links(Link(1e9), {(1, 2): Link(1e7)}).from_component(0, 3, 1) == Link(1e9)
    assert (CHAIN.bytes_per_ms, CHAIN.latency_ms) == (5e6, 0.02)
    assert Links.alike(7.0).from_component(1, 3, 2) == Link(3.5)


def test_kept_links_are_the_same_as_well_as_one_can_measure() -> None:
    def scaled(factor: float) -> Links:
        pairs = {k: Link(v.bytes_per_ms * factor, v.latency_ms) for k, v in CHAIN.pairs.items()}
        return Links(CHAIN.otherwise, pairs)

    assert all(scaled(f).like(CHAIN.to_list()) for f in (0.7, 0.95, 1.0, 1.4))
    assert not any(scaled(f).like(CHAIN.to_list()) for f in (0.3, 0.6, 1.6, 10.0))
    assert not Links.alike(2e7).like(CHAIN.to_list())
    assert Links.alike(2e7).like([])


def test_a_slow_link_has_cuts_with_fewer_bytes() -> None:
    ms, last = [1.0] * 8, [1, 2, 3, 4, 5, 6, 7, 7]
    nbytes = [100, 1000, 1000, 1000, 1000, 100, 100, 0]
    assert cut(ms, nbytes, last, 2, Links.alike(1e6)) == [4]
    assert cut(ms, nbytes, last, 2, Links.alike(200.0)) == [6]
