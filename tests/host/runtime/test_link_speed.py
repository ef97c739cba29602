"""Links between ranks, measured: alone, both ways and all at once, over simulated ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import asyncdiff_core as core
from asyncdiff.partition.links import Links
from asyncdiff.processes.team import Team
from asyncdiff.runtime.devices import Place
from asyncdiff.runtime.exchange import link_speed
from asyncdiff.runtime.exchange.link_speed import engine_links, measured

PLACES = [Place.here(torch.device("cpu"))] * 3


def as_it_is(work: Callable[[], bool]) -> None:
    """On a machine with much else to do, one of several tries is good enough."""
    assert any(work() for _ in range(8))


def test_ranks_of_a_cpu_exchange_at_the_speed_of_memory() -> None:
    assert engine_links(PLACES, Team()) == Links.alike(5e6)


@pytest.mark.parametrize(
    ("sharing", "both", "every"), [("", 1, 1), (",both", 2, 2), (",all", 2, 3)]
)
def test_simulated_links_are_measured_as_they_are(
    monkeypatch: pytest.MonkeyPatch, sharing: str, both: int, every: int
) -> None:
    monkeypatch.setenv("ASYNCDIFF_LINK", f"500MB/s,1ms{sharing}")
    rounds = [[(0, 1)], [(0, 1), (1, 0)], [(0, 1), (1, 0), (1, 2)]]

    def found() -> bool:
        alone, two, three = measured(PLACES, rounds, Team())
        assert all(x.latency_ms >= 1.0 for r in (alone, two, three) for x in r.values())
        # (1, 2) shares with the others only where all do.
        means = [sum(x.bytes_per_ms for x in r.values()) / len(r) for r in (alone, two)]
        means.append((three[0, 1].bytes_per_ms + three[1, 0].bytes_per_ms) / 2)
        model = [5e5, 5e5 / both, 5e5 / every]
        # Those who begin earlier have the link for themselves at first, and at the end the others.
        there = [
            m == pytest.approx(x, rel=r)
            for m, x, r in zip(means, model, (0.2, 0.4, 0.5), strict=True)
        ]
        return all(there) and alone[0, 1].latency_ms < 3.0

    as_it_is(found)


def test_an_engine_measures_what_its_components_send_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCDIFF_LINK", "200MB/s,2ms")

    def found() -> bool:
        links = engine_links(PLACES, Team())
        assert sorted(links.pairs) == [(0, 1), (1, 2)]
        assert links.latency_ms >= 2.0
        return links.bytes_per_ms == pytest.approx(2e5, rel=0.2) and links.latency_ms < 4.0

    as_it_is(found)


def test_a_link_that_cannot_be_measured_counts_as_fast(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ASYNCDIFF_LINK", "200MB/s,2ms")

    def late(*_: Any) -> Any:
        raise core.DeviceError("rank 1 waited for rank 0")

    monkeypatch.setattr(link_speed, "measured", late)
    assert engine_links(PLACES, Team()) == Links.alike(5e6)
    assert "could not be measured, and count as fast: rank 1 waited" in caplog.text
