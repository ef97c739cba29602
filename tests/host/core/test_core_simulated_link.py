"""Simulated links of the host fabric: how one says them, when bundles are there, and who shares."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from processes import run

import asyncdiff_core as core
from asyncdiff import InputError, ParallelConfig

BYTES = 1 << 20
LAYOUT = core.Layout([core.TensorSpec("uint8", (BYTES,))])
DATA = np.zeros(BYTES, np.uint8)


def test_what_is_simulated_is_said() -> None:
    fabric = core.HostFabric(3, link="10Gb/s,50us,all")
    assert fabric.simulated_link == "1.25GB/s,50us,all"
    kinds = fabric.links()
    assert {k for (a, b), k in kinds.items() if a != b} == {"simulated"}
    assert {k for (a, b), k in kinds.items() if a == b} == {"memory"}
    assert fabric.link_reasons()[2, 1] == "1.25GB/s,50us,all is simulated over memory"


def test_the_environment_holds_where_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert core.simulated_link() is None and core.HostFabric(2).simulated_link is None
    monkeypatch.setenv("ASYNCDIFF_LINK", "25GB/s,10us")
    assert core.simulated_link() == core.HostFabric(2).simulated_link == "25GB/s,10us"
    assert core.HostFabric(2, link="off").simulated_link is None
    assert core.HostFabric(2, link="6GB/s,1us").simulated_link == "6GB/s,1us"
    monkeypatch.setenv("ASYNCDIFF_LINK", "slow")
    with pytest.raises(core.InvalidArgument, match="ASYNCDIFF_LINK: link 'slow': write BANDWIDTH"):
        core.simulated_link()
    with pytest.raises(core.InvalidArgument, match="ASYNCDIFF_LINK: "):
        core.HostFabric(2)


def test_settings_tell_a_wrong_link_from_a_wrong_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCDIFF_LINK", "slow")
    for deadline in (None, 5):
        with pytest.raises(InputError, match=r"^ASYNCDIFF_LINK: link 'slow': write BANDWIDTH"):
            ParallelConfig(deadline=deadline)
    with pytest.raises(InputError, match="deadline=0: write a positive number"):
        ParallelConfig(deadline=0)


@pytest.mark.parametrize("link", ["25GB/s", "25,10", "0GB/s,1us", "25GB/s,10us,some", "1GB/s,1h"])
def test_what_is_no_link_is_refused(link: str) -> None:
    with pytest.raises(core.InvalidArgument, match="as in 25GB/s,10us"):
        core.HostFabric(2, link=link)


@pytest.mark.parametrize(
    ("sharing", "pairs", "times"),
    [
        ("", [(0, 1)], 1),
        ("", [(0, 1), (1, 0), (1, 2)], 1),
        (",both", [(0, 1), (1, 0), (1, 2)], 2),
        (",all", [(0, 1), (1, 0), (1, 2)], 3),
    ],
)
def test_bundles_are_there_when_they_would_have_arrived(
    sharing: str, pairs: list[tuple[int, int]], times: int
) -> None:
    fabric = core.HostFabric(3, link=f"100MB/s,2ms{sharing}")
    channels = [fabric.channel(a, [b], LAYOUT, slots=1) for a, b in pairs]
    model = 2e-3 + times * BYTES / 1e8
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        for channel in channels:
            channel.put([DATA], 0)
        for channel in channels:
            channel.get(channel.receivers[0], 0)
        took = time.perf_counter() - begun
        assert took >= model
        best = min(best, took)
        for channel in channels:
            channel.release(channel.receivers[0], 0)
    assert best < model + 8e-3


def test_processes_share_links(tmp_path: Path) -> None:
    """Both directions at once take as long as two bundles in one."""
    both = run("linked", 2, tmp_path)
    assert {link for _, link in both} == {"0.1GB/s,2000us,both"}
    # By the clock of the one that begins first.
    assert 2e-3 + 2 * BYTES / 1e8 <= max(seconds for seconds, _ in both) < 1


def test_processes_agree_on_the_link(tmp_path: Path) -> None:
    for text in run("links_differ", 2, tmp_path):
        assert "its simulated link is " in text and "off" in text and "1GB/s,1us" in text


def test_between_hosts_nothing_is_simulated(tmp_path: Path) -> None:
    for text in run("link_between_hosts", 2, tmp_path, hosts="ab"):
        assert "links are simulated between ranks of one host only" in text
