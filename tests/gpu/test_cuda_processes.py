"""The CUDA fabric between processes: device memory shared by CUDA IPC."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import PLACES, devices_for
from processes import run


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("transport", ["auto", "staged"])
@pytest.mark.parametrize(
    ("processes", "mode"), [(2, "copy"), (2, "inline"), (2, "auto"), (4, "kernel")]
)
def test_bundles_arrive_whole_and_in_order(
    place: str, transport: str, processes: int, mode: str, tmp_path: Path
) -> None:
    gpus = len(set(devices_for(place, 2)))
    for result in run("cuda_exchange", processes, tmp_path, gpus, transport, mode):
        # Capturing runs nothing: 20 eager bundles and 200 mixed ones. (Processes take turns on a
        # GPU, milliseconds each.)
        assert result["count"] == 220
        assert result["wrong"] == result["after_reset"] == 0
        staged = transport == "staged"
        assert ("staged" in result["links"]) == staged, result["links"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("sharing", ["", ",both", ",all"])
def test_bundles_arrive_over_simulated_links(
    place: str, sharing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = len(set(devices_for(place, 2)))
    monkeypatch.setenv("ASYNCDIFF_LINK", f"5GB/s,20us{sharing}")
    for result in run("cuda_exchange", 2, tmp_path, gpus, "auto", "auto"):
        assert result["count"] == 220
        assert result["wrong"] == result["after_reset"] == 0
        assert result["links"] == ["simulated"]


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_process_is_an_error_for_all_others(place: str, tmp_path: Path) -> None:
    gpus = len(set(devices_for(place, 2)))
    first, killed, third = run("cuda_killed", 3, tmp_path, gpus)
    assert killed == -9
    for result in (first, third):
        assert result["process"] == 1 and result["ranks"] == [1]
        assert result["seconds"] < 5


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("transport", ["auto", "staged"])
@pytest.mark.parametrize("place", PLACES[1:])
def test_another_gpu_is_left_alone(
    place: str, processes: int, transport: str, tmp_path: Path
) -> None:
    """A context takes half a gigabyte of it."""
    devices_for(place, 2)
    for contexts in run("cuda_contexts", processes, tmp_path, transport):
        assert contexts == [False, True]


@pytest.mark.alone
@pytest.mark.parametrize("place", PLACES)
def test_changes_of_shape_leak_nothing(place: str, tmp_path: Path) -> None:
    gpus = len(set(devices_for(place, 2)))
    for early, late in run("cuda_churn", 3, tmp_path, gpus, 200):
        assert late <= early + (8 << 20)


@pytest.mark.parametrize("place", PLACES)
def test_different_calls_are_an_error_everywhere(place: str, tmp_path: Path) -> None:
    gpus = len(set(devices_for(place, 2)))
    first, second = run("mismatch", 2, tmp_path, gpus)
    assert "tensor 0 is float16(8) with strides (1) here, bfloat16(8)" in first["dtype"]
    assert "the channel's name is 'last' here, 'first' in process 0" in second["order"]
    assert "its first bundle is 6 here, 7 in process 1" in first["reset"]
    assert "the call is make a channel here, reset in process 1" in first["call"]
    assert "rank 99: the fabric has ranks 0 to 1" in first["rank"]


@pytest.mark.parametrize("place", PLACES)
def test_a_fabric_that_fails_half_made_harms_nobody(place: str, tmp_path: Path) -> None:
    gpus = len(set(devices_for(place, 2)))
    for failed, bundle in run("cuda_cut", 2, tmp_path, gpus):
        assert failed == 3  # after that the rendezvous is not needed
        assert bundle == [1, 2, 3]


@pytest.mark.parametrize("what", ["reset", "channel"])
@pytest.mark.parametrize("place", PLACES)
def test_an_abort_waits_for_no_call(place: str, what: str, tmp_path: Path) -> None:
    gpus = len(set(devices_for(place, 2)))
    (told, _), (_, got) = run("cuda_abort_beside", 2, tmp_path, gpus, what)
    assert "enough" in told
    assert got == list(range(8))
