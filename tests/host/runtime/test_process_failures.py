"""Processes of a group that differ, and processes that are gone: who is told what, and when."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import group_failures
import pytest
from group import run


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Iterator[None]:
    before = set(Path("/dev/shm").glob("asyncdiff-*"))
    yield
    assert set(Path("/dev/shm").glob("asyncdiff-*")) <= before


def test_differences(tmp_path: Path) -> None:
    """Both are told the same, by name and process; the next call works."""
    both, alone = run(group_failures.differences, 2, tmp_path), group_failures.alone()
    whats = {
        "settings": "the setting warmup",
        "weights": "the values of the denoiser's weights",
        "model": "the number of the denoiser's weights",
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
        assert found["bits"] == alone
        assert found["closed"]["kind"] in ("ProcessError", "InputError")
    assert "said by process 1" in both[0]["hooks"]["text"]


def test_gone(tmp_path: Path) -> None:
    moments = list(group_failures.GONE)
    found, alone = run(group_failures.gone, 3, tmp_path, moments), group_failures.alone()
    for i, moment in enumerate(moments):
        three = found[3 * i : 3 * i + 3]
        gone = group_failures.GONE[moment]
        left = [x for p, x in enumerate(three) if p != gone]
        assert moment == "late" or three[gone] == -9, moment
        for told in left:
            assert told["kind"] in ("ProcessError", "RankError"), (moment, told)
            assert told["rank"] == gone, (moment, told)
            patience = 10 if moment == "coming" else 1
            assert told["seconds"] < patience * group_failures.DEADLINE + 8, (moment, told)
            assert told["again"] == alone, moment
