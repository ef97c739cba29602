"""Links between ranks, measured: alone, both ways and all at once, over simulated ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncdiff_core as core
from asyncdiff.partition.links import Link, Links
from asyncdiff.preparation.folder import preparations
from asyncdiff.processes.team import Team
from asyncdiff.runtime import devices
from asyncdiff.runtime.cutting import link_speed
from asyncdiff.runtime.cutting.link_speed import engine_links, measured, once_measured
from asyncdiff.runtime.devices import Place

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


def gpus(count: int) -> list[Place]:
    return [Place.here(torch.device("cuda", i)) for i in range(count)]


class Measure:
    """What it finds, and how often it was asked."""

    def __init__(self, rate: float = 3e8) -> None:
        self.found = Links(Link(1e9), {(0, 1): Link(rate, 0.01)})
        self.count = 0

    def __call__(self, places: Sequence[Place], team: Team) -> Links:
        self.count += 1
        return self.found


def test_links_of_gpus_are_measured_once_for_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ASYNCDIFF_CACHE", str(tmp_path))
    monkeypatch.setattr(devices, "_uuid", lambda device: names[device.index])
    names = ["one", "other"]
    first, again = Measure(), Measure(1e6)
    places = gpus(2)
    assert once_measured(places, Team(), first) == first.found
    assert once_measured(places, Team(), again) == first.found and again.count == 0
    (entry,) = preparations().entries()
    assert (entry.kind, entry.of) == ("links", "links between 2 GPUs")
    # The same GPUs under other names, over another way, and simulated ones.
    names.reverse()
    assert once_measured(places, Team(), again) == again.found
    names.reverse()
    monkeypatch.setenv("ASYNCDIFF_TRANSPORT", "staged")
    once_measured(places, Team(), again)
    monkeypatch.delenv("ASYNCDIFF_TRANSPORT")
    monkeypatch.setenv("ASYNCDIFF_LINK", "1GB/s,1us")
    once_measured(places, Team(), again)
    assert again.count == 3 and len(preparations().entries()) == 3
    monkeypatch.delenv("ASYNCDIFF_LINK")
    # What cannot be read is measured anew.
    for file in (tmp_path / "preparations").glob("links-*"):
        file.write_bytes(b"not this")
    assert once_measured(places, Team(), again) == again.found


@pytest.mark.parametrize(
    "links",
    [
        [],
        [[0, 1, 3e8]],
        [[0, 1, -3e8, 0.01]],
        [[0, 1, 0.0, 0.01]],
        [[0, 1, float("nan"), 0.01]],
        [[0, 1, 3e8, float("nan")]],
        [[0, 1, 10**400, 0.01]],
        [[0, 2, 3e8, 0.01]],
        [[0, 1.5, 3e8, 0.01]],
        [[0, 1, 3e8, 0.01], [1, 2, 3e8, 0.01]],
        [[0, 1, 3e8, 0.01], [0, 1, 3e8, 0.01]],
        {"0": 1},
        [3],
    ],
)
def test_links_that_cannot_be_are_measured_anew(
    links: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is in a file: of other ranks, too few, or of no speed."""
    monkeypatch.setenv("ASYNCDIFF_CACHE", str(tmp_path))
    monkeypatch.setattr(devices, "_uuid", lambda device: f"GPU {device.index}")
    measure, folder = Measure(), preparations()
    once_measured(gpus(2), Team(), measure)
    (entry,) = folder.entries()
    folder.write(entry.kind, entry.key, entry.of, {"links": links})
    assert once_measured(gpus(2), Team(), measure) == measure.found and measure.count == 2
    assert "a preparation on the disk is ignored" in caplog.text
    assert once_measured(gpus(2), Team(), measure) == measure.found and measure.count == 2


def test_what_is_not_measured_or_not_of_gpus_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASYNCDIFF_CACHE", str(tmp_path))
    names = ["one", "other"]
    monkeypatch.setattr(devices, "_uuid", lambda device: names[device.index])
    once_measured(gpus(2), Team(), lambda *_: Links.alike(1e9))
    once_measured(PLACES, Team(), Measure())
    names = ["", ""]  # torch does not tell
    once_measured(gpus(2), Team(), Measure())
    assert preparations().entries() == []
