"""A denoiser whose ranks are on several hosts, which processes say they are on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import group_bits
import group_hosts
import pytest
from group import run

import asyncdiff_core as core
from asyncdiff.runtime.exchange.awaited import Awaited
from asyncdiff.runtime.exchange.credits import Credits
from asyncdiff.runtime.exchange.push import Way
from asyncdiff.runtime.exchange.results import Result
from asyncdiff.schedule.actions import NOTHING


class Recorded:
    """A channel that notes its calls."""

    slots = 2

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *given: self.calls.append((name, *given))


def test_the_host_waits_for_each_bundle_before_a_gpu_does() -> None:
    channel: Any = Recorded()
    end = Awaited(channel)
    for _ in range(2):
        end.begin()
        for slot in (0, 1, 0):
            end.get(3, slot, None)
            end.release(3, slot, None)
    steps = [("wait_for", "get", "release")] * 6
    names = [call[0] for call in channel.calls]
    assert names == [name for step in steps for name in step]
    waits = [call for call in channel.calls if call[0] == "wait_for"]
    assert waits == [("wait_for", 3, n) for n in (1, 2, 3)] * 2  # a generation's, from its first


def test_the_host_waits_for_room_before_a_run_is_issued() -> None:
    first: Any = Recorded()
    second: Any = Recorded()
    predicted: Any = Recorded()
    senders: Any = {
        target: [Way(channel, slot, core.Layout([])) for slot in range(2)]
        for target, channel in ((1, first), (2, second))
    }
    fabric: Any = None
    result = Result(fabric, predicted, core.Layout([]), ())
    credits = Credits()
    for _ in range(2):
        credits.begin()
        assert credits.take_for(((), 0, False), senders, result) == 0
        assert [credits.take_for(((), 1, True), senders, result) for _ in range(3)] == [0, 1, 0]
        assert credits.take_for(((), NOTHING, True), senders, None) == 0
    waits = [("wait_free", n) for n in (1, 2, 3, 4)]
    assert first.calls == second.calls == waits * 2 and predicted.calls == waits[:3] * 2


@pytest.mark.parametrize("hosts", ["ab", pytest.param("aa", marks=pytest.mark.slow)])
def test_nobody_waits_for_others_before_all_is_issued(hosts: str, tmp_path: Path) -> None:
    """Between hosts, where the host waits for results, or engines of conditions, and of pictures,
    would run one after another."""
    together, in_turn = ["issue"] * 2 + ["results"] * 2, ["issue", "results"] * 2
    for found in run(group_hosts.order, 2, tmp_path, hosts=hosts):
        assert found == [together if hosts == "ab" else in_turn] * 2


@pytest.mark.parametrize(
    ("hosts", "results"),
    [
        ("ab", "all"),
        *(
            pytest.param(hosts, results, marks=pytest.mark.slow)
            for hosts, results in [("ab", "first"), ("abb", "all"), ("abc", "first")]
        ),
    ],
)
def test_the_bits_are_those_of_one_process(hosts: str, results: str, tmp_path: Path) -> None:
    """With the noise predictions for all, and for process 0 alone: the others' are noise."""
    count = len(hosts)
    found = run(group_hosts.settings, count, tmp_path, [results], hosts=hosts)
    alone = group_hosts.settings_alone(count)
    assert found[0] == alone
    assert found == [alone] * count or results == "first"


def test_what_links_between_hosts_carry_is_measured(tmp_path: Path) -> None:
    for one in run(group_hosts.links, 3, tmp_path, hosts="aab"):
        assert one["hosts"] == [0, 0, 1]
        assert one["links"] == ["memory", "sockets"]
        assert one["units"] == ["cpu of host 0", "cpu of host 1"]
        (speed,) = one["speeds"]
        assert speed > 0


@pytest.mark.slow
def test_a_process_that_is_killed_on_another_host_is_named(tmp_path: Path) -> None:
    first, second, killed = run(group_hosts.killed, 3, tmp_path, hosts="aba")
    assert killed == -9
    assert first["again"] == second["again"]
    for one in (first, second):
        assert one["kind"] == "ProcessError" and one["rank"] == 2
        assert one["seconds"] < 5


def test_a_failed_rank_stops_all_hosts_and_the_next_generation_works(tmp_path: Path) -> None:
    """The engine is the same, and a new one where its fabric is over after a failure."""
    *goes_on, a, b = run(group_hosts.failed, 2, tmp_path, ["recovers", "over"], hosts="ab")
    for one in (*goes_on, a, b):
        assert one["kind"] == "RankError" and one["rank"] == 1
        assert one["same"] == [True, True]
    assert all(one["kept"] == [True] for one in goes_on)
    assert all(one["kept"] == [False] for one in (a, b))


@pytest.mark.slow
@pytest.mark.parametrize("hosts", ["ab", "aab"])
def test_tokens_are_shared_out_between_hosts(hosts: str, tmp_path: Path) -> None:
    first, *others = run(group_bits.tokens, len(hosts), tmp_path, hosts=hosts)
    assert others == [first] * len(others)
    # Links between hosts are slower: with other steps, too, the denoiser is cut elsewhere.
    assert first[:2] == group_bits.tokens_alone(len(hosts))[:2]
