"""Processes of a group that differ, and processes that are gone: who is told what, and when."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import group_failures
import pytest
from group import run
from processes import left_behind


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Iterator[None]:
    yield
    assert not left_behind()


def test_differences(tmp_path: Path) -> None:
    """Both are told the same, by name and process; the next call works."""
    both, alone = run(group_failures.differences, 2, tmp_path), group_failures.alone()
    whats = {
        "settings": "the setting warmup",
        "weights": "the values of the denoiser's weights",
        "model": "the number of the denoiser's weights",
        "calibration": "the setting order",
        "sample": "sample",
        "text": "encoder_hidden_states",
        "shape": "the shape of sample",
        "times": "the timesteps",
        "configured": "the setting warmup",
        "calls": "the call",
    }
    for found in both:
        for name, what in whats.items():
            assert (found[name]["kind"], found[name]["what"]) == ("MismatchError", what), name
        assert all(found[name]["rank"] == 1 for name in whats if name != "calls")
        assert "1 in process 0, 2 in process 1" in found["settings"]["text"]
        assert found["ranks"]["kind"] == "DeviceError"
        assert "need 3" in found["ranks"]["text"]
        assert found["hooks"]["kind"] == "InputError"
        assert found["bits"] == alone and found["beside"] == [alone] * 2
        assert found["mesh"]["kind"] == "InputError" and "2 dimensions" in found["mesh"]["text"]
        assert found["closed"]["kind"] in ("ProcessError", "InputError")
    assert "said by process 1" in both[0]["hooks"]["text"]


@pytest.mark.parametrize(
    "moments",
    [
        ("preparing", "in"),
        pytest.param(("stopped", "between"), marks=pytest.mark.slow),
        pytest.param(("coming", "making", "first", "late"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_gone(moments: tuple[str, ...], tmp_path: Path) -> None:
    found, alone = run(group_failures.gone, 3, tmp_path, moments), group_failures.alone()
    for i, moment in enumerate(moments):
        three = found[3 * i : 3 * i + 3]
        gone = group_failures.GONE[moment]
        left = [x for p, x in enumerate(three) if p != gone]
        assert moment == "late" or three[gone] == -9, moment
        for told in left:
            assert told["kind"] in ("ProcessError", "RankError"), (moment, told)
            assert told["rank"] == gone, (moment, told)
            patience = 10 if moment == "coming" else 1  # of deadlines
            assert told["seconds"] < patience * group_failures.DEADLINE + 8, (moment, told)
            assert told["again"] == alone, moment


@pytest.mark.parametrize(
    ("kinds", "hosts"),
    [
        (("ValueError",), ""),
        pytest.param(("KeyboardInterrupt", "none"), "", marks=pytest.mark.slow),
        pytest.param(("ValueError", "KeyboardInterrupt", "none"), "ab", marks=pytest.mark.slow),
    ],
)
def test_an_error_of_the_loop_is_told_at_once(
    kinds: tuple[str, ...], hosts: str, tmp_path: Path
) -> None:
    """Who gave up and why, long before the deadline; the next generation works. Where all leave
    without an error nobody is told anything."""
    found = run(group_failures.raised, 2, tmp_path, kinds, hosts=hosts)
    alone = group_failures.alone()
    for i, kind in enumerate(kinds):
        other, one = found[2 * i : 2 * i + 2]
        assert one["kind"] == kind and other["again"] == one["again"] == alone, kind
        if kind == "none":
            assert other["kind"] == "none"
        else:
            assert (other["kind"], other["rank"]) == ("RankError", 1), other
            assert f"({kind}: of my own)" in other["text"] and other["seconds"] < 5, other


def test_errors_of_several_processes_at_once(tmp_path: Path) -> None:
    """What is not ours is raised where it was, and everywhere else it is a ProcessError: nobody
    takes another way after one of ours while others do not."""
    assert list(map(list, zip(*run(group_failures.at_once, 3, tmp_path), strict=True))) == [
        ["ProcessError", "RuntimeError", "ProcessError"],
        ["RuntimeError", "ProcessError", "ProcessError"],
        ["CaptureError", "CaptureError", "CaptureError"],
        ["ProcessError", "RuntimeError", "ValueError"],
        ["CaptureError", "CaptureError", "CaptureError"],
    ]


@pytest.mark.parametrize("option", ["export", "look"])
def test_a_process_fails_where_others_find_that_values_are_needed(
    option: str, tmp_path: Path
) -> None:
    """Which then do not go on without it; the next call works."""
    other, one = run(group_failures.values, 2, tmp_path, [option])
    assert "process 1 could not" in other[0] and "ValueError: not now" in other[0]
    assert one[0] == "not now"
    assert max(*other[1:], *one[1:]) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("hosts", ["", "abc"])
def test_gone_among_tokens(hosts: str, tmp_path: Path) -> None:
    where = ("gives", "takes", "ends")
    found = run(group_failures.gone_among_tokens, 3, tmp_path, where, hosts=hosts)
    alone = group_failures.loop(
        group_failures.by_tokens(2, devices=["cpu"] * 2), group_failures.attention_call()
    )
    for i, moment in enumerate(where):
        first, gone, last = found[3 * i : 3 * i + 3]
        assert gone == -9, moment
        for told in (first, last):
            assert (told["kind"], told["rank"]) == ("ProcessError", 1), (moment, told)
            assert told["seconds"] < group_failures.DEADLINE + 8, (moment, told)
            assert told["again"] == alone, moment


@pytest.mark.slow
@pytest.mark.parametrize("hosts", ["", "ab"])
def test_who_stands_still_while_it_prepares_is_named(hosts: str, tmp_path: Path) -> None:
    other, one = run(group_failures.silent, 2, tmp_path, hosts=hosts)
    assert other["busy"]["kind"] == one["busy"]["kind"] == "none"
    assert other["busy"]["seconds"] > 3 > group_failures.SILENCE
    for told in (other["still"], one["still"]):
        assert (told["kind"], told["rank"]) == ("ProcessError", 1), told
        assert "whose last word was 'the last part'" in told["text"]
    assert other["still"]["seconds"] < 3 * group_failures.SILENCE


@pytest.mark.slow
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize(
    ("processes", "hosts"), [(2, ""), (3, ""), (4, ""), (2, "ab"), (3, "aba"), (4, "aabb")]
)
def test_kills_at_random(processes: int, hosts: str, part: int, tmp_path: Path) -> None:
    """Whoever is left is told who went, at once, and goes on without it. More kills are the
    core's (test_core_kills.py)."""
    seeds = [str(100 * processes + 4 * part + i) for i in range(4)]
    found = run(group_failures.killed, processes, tmp_path, seeds, hosts=hosts)
    drawn, wrong = set(), []
    for i, seed in enumerate(seeds):
        of_seed = found[processes * i : processes * (i + 1)]
        left = [x for x in of_seed if x != -9]
        assert len(left) == processes - 1, (seed, of_seed)
        for told in left:
            # Only while all come together is there no telling who lives.
            limit = 12 if told["after"] < 0.5 else 3
            if (
                told["kind"] not in ("ProcessError", "RankError")
                or told["rank"] != told["victim"]
                or told["seconds"] > told["after"] + limit * group_failures.DEADLINE
            ):
                wrong.append((seed, told))
        drawn |= {told.get("again") for told in left}
    assert not wrong and len(drawn) == 1


@pytest.mark.slow
@pytest.mark.parametrize("hosts", ["", "ab"])
def test_changes_of_shape_leave_nothing(hosts: str, tmp_path: Path) -> None:
    for before, after in run(group_failures.shapes, 2, tmp_path, ["60"], hosts=hosts):
        assert after["bytes"] < before["bytes"] + 20 * 2**20, (before, after)
        for what in ("descriptors", "threads", "shared"):
            assert after[what] <= before[what], (what, before, after)
