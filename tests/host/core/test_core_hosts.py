"""The host fabric between hosts, which processes say they are on: the scenarios of one host."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from processes import left_behind, on_host, run
from test_core_kills import kill_all_but_one

import asyncdiff_core as core

SLOW = pytest.param("slow", marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Any:
    yield
    assert not left_behind()


@pytest.mark.parametrize("hosts", ["ab", "aab", "abca"])
def test_bundles_arrive_whole_and_in_order(hosts: str, tmp_path: Path) -> None:
    count = 2 * 300 * (len(hosts) - 1)
    assert run("exchange", len(hosts), tmp_path, hosts=hosts) == [count] * len(hosts)


def test_a_killed_process_is_an_error_on_all_hosts(tmp_path: Path) -> None:
    first, killed, third = run("killed", 3, tmp_path, hosts="aab")
    assert killed == -9
    for result in (first, third):
        assert result["process"] == 1 and result["ranks"] == [1]
        assert result["seconds"] < 1


def test_an_abort_reaches_all_hosts(tmp_path: Path) -> None:
    for result in run("abort", 3, tmp_path, hosts="aba"):
        assert result["rank"] == 0
        assert "enough of this" in result["text"]


def test_different_calls_are_an_error_everywhere(tmp_path: Path) -> None:
    first, second, third = run("mismatch", 3, tmp_path, hosts="aab")
    assert "the number of its slots is 2 here, 102 in process 1" in first["slots"]
    assert "in process 0; tensor 0 is bfloat16(8)" in second["dtype"]
    assert "its first bundle is 6 here, 7 in process 1. This is process 2" in third["reset"]


@pytest.mark.parametrize("hosts", ["ab", "abc"])
def test_a_channel_that_fails_in_one_process_leaves_the_fabric_whole(
    hosts: str, tmp_path: Path
) -> None:
    for error in run("no_memory", len(hosts), tmp_path, hosts=hosts):
        assert "bad_alloc" in error


def test_only_the_ends_of_a_channel_take_part(tmp_path: Path) -> None:
    first, second, third = run("ends", 3, tmp_path, hosts="abb")
    assert first["received"] == [] and second["received"] == [0.0] * 29
    assert "rank 1 belongs to process 1" in third["received"][0]
    assert first["all"] == second["all"] == third["all"] == [0, 1, 2]


@pytest.mark.parametrize("changes", [300, pytest.param(10000, marks=pytest.mark.slow)])
def test_changes_of_shape_leak_nothing(changes: int, tmp_path: Path) -> None:
    for early, late in run("churn", 3, tmp_path, changes, hosts="aab"):
        assert late[0] < early[0] + (1 << 20), "resident memory"
        assert late[1] <= early[1] + 2, "mappings"
        assert late[2] <= early[2], "open files"


@pytest.mark.parametrize("how", ["killed", pytest.param("closed", marks=pytest.mark.slow), SLOW])
def test_who_waits_for_whom_is_followed_to_the_one_that_is_gone(how: str, tmp_path: Path) -> None:
    _, *others = run("chain", 4, tmp_path, how, hosts="aabb")
    for other in others:
        if how == "slow":
            assert other["straggler"] == 0 and "failed, or is slower" in other["e"]
            continue
        assert other["process"] == 0 and other["ranks"] == [0]
        assert "process 0 (rank 0) has" in other["e"]
        assert other["s"] < 1.5  # of which process 0 lived half a second


@pytest.mark.parametrize("how", ["killed", pytest.param("sleeps", marks=pytest.mark.slow)])
def test_who_misses_a_collective_call_is_named(how: str, tmp_path: Path) -> None:
    first, missing, third = run("collective", 3, tmp_path, how, hosts="aba")
    for result in (first, third):
        assert result["process"] == 1 and result["ranks"] == [1]
        assert result["error"] == ("CollectiveTimeout" if how == "sleeps" else "ProcessLost")
        assert result["seconds"] < (3 if how == "sleeps" else 1)
        assert result["again"] == 2
    if how == "sleeps":  # it learns at once why nobody is there
        assert missing["error"] == "CollectiveTimeout" and missing["seconds"] < 0.5


def test_a_forked_child_does_not_act_for_its_parent(tmp_path: Path) -> None:
    first, _ = run("forked", 2, tmp_path, hosts="ab")
    assert len(first) == 4
    assert all("forked" in text for text in first)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("worlds", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_whoever_is_killed_is_named_on_all_hosts(worlds: int, tmp_path: Path) -> None:
    """2 to 4 processes on 2 hosts, or 3: 10 worlds are 20 kills."""
    rng = random.Random(worlds)
    errors = []
    for world in range(worlds):
        folder = tmp_path / str(world)
        folder.mkdir()
        hosts = ["aab", "ab", "abca"][world % 3]
        errors += kill_all_but_one(len(hosts), rng, folder, hosts)
    assert worlds == 1 or errors.count("ProcessLost") > 0


class Alone:
    """A rendezvous whose other process says the same, from another host."""

    process, processes = 0, 2

    def all_gather(self, mine: bytes) -> list[bytes]:
        there = b"named there\0"
        at = mine.find(b"named here\0")
        return [mine, mine if at < 0 else mine[:at] + there + mine[at + len(there) :]]


def test_a_host_that_is_not_reached_is_an_error_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in on_host("here").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(core.CollectiveTimeout) as e:
        core.HostFabric(2, deadline=0.5, rendezvous=Alone())
    assert e.value.process == 1
    assert "process 1, on another host, did not connect to process 0 within 0.25 s" in str(e.value)
    assert "name the network interface that they share by ASYNCDIFF_INTERFACE" in str(e.value)
