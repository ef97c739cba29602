"""A denoiser whose ranks are in several processes, on one GPU and on several: the same bits as by
one process; what the others are told when one is killed. How long it takes is measured by
benchmarks/denoise/processes.py."""

from __future__ import annotations

from pathlib import Path

import group_cuda
import pytest
from conftest import PLACES, devices_for
from group import run

pytestmark = pytest.mark.usefixtures("full_float32")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("processes", [2, 3])
def test_bits(place: str, processes: int, tmp_path: Path) -> None:
    devices_for(place, processes)
    alone = group_cuda.alone(place, processes)
    for found in run(group_cuda.bits, processes, tmp_path, [place], fork=False):
        assert found == alone


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("what", ["components", "tokens"])
def test_between_hosts(what: str, place: str, tmp_path: Path) -> None:
    """Over NCCL, where a thread of each process has to enqueue its part while others wait."""
    devices_for(place, 2)
    work, alone = {
        "components": (group_cuda.bits_between_hosts, lambda: group_cuda.alone(place, 2)),
        "tokens": (group_cuda.tokens_between_hosts, lambda: group_cuda.tokens_alone(place)),
    }[what]
    wanted = alone()
    for found in run(work, 2, tmp_path, [place], fork=False, hosts="ab"):
        assert found == wanted


@pytest.mark.parametrize("place", PLACES)
def test_killed(place: str, tmp_path: Path) -> None:
    devices_for(place, 3)
    first, killed, third = run(group_cuda.killed, 3, tmp_path, [place], fork=False)
    assert killed == -9
    for found in (first, third):
        assert found["kind"] in ("ProcessError", "RankError") and found["rank"] == 1, found
        assert found["seconds"] < 12
    assert first["again"] == third["again"]
