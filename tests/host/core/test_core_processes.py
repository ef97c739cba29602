"""The host fabric between processes: what arrives, who learns of a death, and what stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import core_torch
import group
import pytest
from processes import left_behind, run

import asyncdiff_core as core


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Any:
    yield
    assert not left_behind()


@pytest.mark.parametrize("processes", [2, 4])
def test_bundles_arrive_whole_and_in_order(processes: int, tmp_path: Path) -> None:
    count = 2 * 300 * (processes - 1)
    assert run("exchange", processes, tmp_path) == [count] * processes


def test_a_killed_process_is_an_error_for_all_others(tmp_path: Path) -> None:
    first, killed, third = run("killed", 3, tmp_path)
    assert killed == -9
    for result in (first, third):
        assert result["process"] == 1 and result["ranks"] == [1]
        assert result["seconds"] < 3


def test_who_is_stopped_is_not_waited_for(tmp_path: Path) -> None:
    """By SIGSTOP, say: it is found after the deadline, whatever the call's own timeout is."""
    first, second, killed = run("stopped", 3, tmp_path, 1)
    assert killed == -9
    for process, text, seconds in (first, second):
        assert process == 2 and "process 2 (rank 2) is stopped, by a signal" in text
        assert 0.9 < seconds < 10


def test_an_abort_reaches_all_processes(tmp_path: Path) -> None:
    for result in run("abort", 3, tmp_path):
        assert result["rank"] == 0
        assert "enough of this" in result["text"]


def test_different_calls_are_an_error_everywhere(tmp_path: Path) -> None:
    first, second, third = run("mismatch", 3, tmp_path)
    assert "the number of its slots is 2 here, 102 in process 1" in first["slots"]
    assert "tensor 0 is bfloat16(8) with strides (1) here, float16(8)" in second["dtype"]
    assert "in process 0; tensor 0 is bfloat16(8)" in second["dtype"]
    assert "the channel's name is 'first' here, 'last' in process 1" in third["order"]
    assert "its first bundle is 6 here, 7 in process 1. This is process 2" in third["reset"]
    assert "the call is reset here, make a channel in process 0" in second["call"]
    for texts in (first, second, third):
        assert "rank 99: the fabric has ranks 0 to 2" in texts["rank"]


class Garbled:
    """A rendezvous whose other process sends what nobody can read."""

    process, processes = 0, 2

    def __init__(self, bytes_: bytes, good: int) -> None:
        self.bytes = bytes_
        self.good = good

    def all_gather(self, mine: bytes) -> list[bytes]:
        self.good -= 1
        return [mine, mine if self.good >= 0 else self.bytes]


@pytest.mark.parametrize("good", range(3))
@pytest.mark.parametrize(
    "sent", [b"!\xff\xfe", b"=\xff", b"\xff\xfe", b"=99999999999:\xff", b"=-1:"]
)
def test_what_others_send_need_not_be_text(sent: bytes, good: int) -> None:
    with pytest.raises(core.CoreError, match="process 1"):
        core.HostFabric(2, deadline=0.3, rendezvous=Garbled(sent, good))


def test_only_the_ends_of_a_channel_take_part(tmp_path: Path) -> None:
    first, second, third = run("ends", 3, tmp_path)
    assert first["received"] == [] and second["received"] == [0.0] * 29
    assert "rank 1 belongs to process 1" in third["received"][0]
    assert first["all"] == second["all"] == third["all"] == [0, 1, 2]


@pytest.mark.parametrize("changes", [1000, pytest.param(10000, marks=pytest.mark.slow)])
def test_changes_of_shape_leak_nothing(changes: int, tmp_path: Path) -> None:
    for early, late in run("churn", 3, tmp_path, changes):
        assert late[0] < early[0] + (1 << 20), "resident memory"
        assert late[1] <= early[1] + 2, "mappings"
        assert late[2] <= early[2], "open files"


@pytest.mark.parametrize(
    "how", ["killed", "closed", "exited", pytest.param("slow", marks=pytest.mark.slow)]
)
def test_who_waits_for_whom_is_followed_to_the_one_that_is_gone(how: str, tmp_path: Path) -> None:
    gone, *others = run("chain", 4, tmp_path, how)
    assert gone == (-9 if how == "killed" else "gone")
    for other in others:
        if how == "slow":
            assert other["straggler"] == 0 and "failed, or is slower" in other["e"]
            continue
        assert other["process"] == 0 and other["ranks"] == [0]
        assert "process 0 (rank 0) has" in other["e"]
        assert other["s"] < 1.5  # of which process 0 lived half a second


@pytest.mark.parametrize("how", ["killed", "exits", "sleeps"])
def test_who_misses_a_collective_call_is_named(how: str, tmp_path: Path) -> None:
    first, missing, third = run("collective", 3, tmp_path, how)
    for result in (first, third):
        assert result["process"] == 1 and result["ranks"] == [1]
        assert result["error"] == ("CollectiveTimeout" if how == "sleeps" else "ProcessLost")
        assert "process 1 (rank 1)" in result["e"]
        assert result["seconds"] < (3 if how == "sleeps" else 1)
        assert result["again"] == 2
    if how == "sleeps":  # it learns at once why nobody is there
        assert missing["error"] == "CollectiveTimeout" and missing["seconds"] < 0.5


def test_a_forked_child_does_not_act_for_its_parent(tmp_path: Path) -> None:
    first, _ = run("forked", 2, tmp_path)
    assert len(first) == 4
    assert all("forked" in text for text in first)


def test_ends_of_other_processes_are_refused(tmp_path: Path) -> None:
    first, second = run("foreign", 2, tmp_path)
    assert "rank 2 belongs to process 1" in first
    assert "rank 1 belongs to process 0" in second


def test_over_a_torch_store(tmp_path: Path) -> None:
    assert group.run(core_torch.store, 2, tmp_path) == [7.0, 7.0]


def test_from_a_process_group(tmp_path: Path) -> None:
    results = group.run(core_torch.group, 3, tmp_path)
    all_ = [[f"{mark}{p}" for p in range(3)] for mark in ("first", "second")]
    assert [heard for heard, _ in results] == [all_, [*all_, ["1", "2"]], [*all_, ["1", "2"]]]
    assert "this process is not in the group" in results[0][1]


def test_from_no_process_group() -> None:
    with pytest.raises(core.InvalidArgument, match=r"before torch\.distributed\.init"):
        core.HostFabric.from_group()


def test_the_core_imports_no_torch() -> None:
    code = "import sys, asyncdiff_core; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class Alone:
    """A rendezvous of one process that gathers what a test wants."""

    process, processes = 0, 1

    def __init__(self, answer: list[bytes] | None = None) -> None:
        self.answer = answer
        self.heard: list[bytes] = []

    def all_gather(self, mine: bytes) -> list[bytes]:
        self.heard.append(mine)
        return [mine] if self.answer is None else self.answer


def test_a_rendezvous_is_checked() -> None:
    fabric = core.HostFabric(2, owners=[0, 0], rendezvous=Alone())
    fabric.reset()
    with pytest.raises(core.InvalidArgument, match="gathered from 2 processes, there are 1"):
        core.HostFabric(1, rendezvous=Alone([b"", b""]))
    with pytest.raises(core.InvalidArgument, match="owners names process 1"):
        core.HostFabric(2, rendezvous=Alone())
    with pytest.raises(core.InvalidArgument, match="owners has 1 entries for 2 ranks"):
        core.HostFabric(2, owners=[0], rendezvous=Alone())
    with pytest.raises(core.InvalidArgument, match="without a rendezvous"):
        core.HostFabric(2, owners=[0, 0])


def test_a_callback_is_a_rendezvous() -> None:
    rendezvous = core.CallbackRendezvous(0, 1, lambda mine: [mine])
    assert core.HostFabric(1, rendezvous=rendezvous).ranks == 1


def test_leftovers_of_dead_processes_are_removed() -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = os.stat("/proc/self/ns/pid").st_ino
    left = Path(f"/dev/shm/asyncdiff-{here:x}-{dead.pid}-0123")
    # Of another container, where a process of this number may be alive.
    others = Path(f"/dev/shm/asyncdiff-{here + 1:x}-{dead.pid}-0123")
    unknown = Path(f"/dev/shm/asyncdiff-0-{dead.pid}-0123")
    for name in (left, others, unknown):
        name.touch()
    try:
        rendezvous = Alone()
        core.HostFabric(1, rendezvous=rendezvous)
        name = f"/asyncdiff-{here:x}-{os.getpid()}-".encode()
        assert any(name in handle for handle in rendezvous.heard)
        assert not left.exists()
        assert others.exists() and unknown.exists()
    finally:
        for name in (left, others, unknown):
            name.unlink(missing_ok=True)
