"""The CUDA fabric between hosts: two processes that count as on two of them, over NCCL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import devices_for
from processes import on_host, run

pytestmark = pytest.mark.alone

#: NCCL takes processes with other host ids for processes of other hosts, also on one GPU, and then
#: goes through sockets. Otherwise it sees two GPUs of one machine, and goes from one to the other.
WAYS = ("sockets, one GPU", "sockets, two GPUs", "direct, two GPUs")


def run_between_hosts(way: str, scenario: str, folder: Path, *options: object) -> list[Any]:
    gpus = len(set(devices_for("one GPU" if "one GPU" in way else "several GPUs", 2)))

    def env(host: str) -> dict[str, str]:
        out = on_host(host) | {"NCCL_SOCKET_IFNAME": "lo"}
        if way.startswith("sockets"):
            out |= {"NCCL_HOSTID": host, "NCCL_IB_DISABLE": "1"}
            out |= {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}
        return out

    return run(scenario, 2, folder, gpus, *options, hosts="ab", env=env)


@pytest.mark.parametrize("way", WAYS)
def test_bundles_of_all_sizes_arrive_whole(way: str, tmp_path: Path) -> None:
    for result in run_between_hosts(way, "nccl_sizes", tmp_path):
        assert result == {"wrong": [], "links": ["nccl", "nccl"]}


@pytest.mark.parametrize("way", WAYS)
def test_bundles_arrive_in_order_eagerly_and_in_graphs(way: str, tmp_path: Path) -> None:
    for result in run_between_hosts(way, "cuda_exchange", tmp_path, "auto", "auto"):
        assert result == {"count": 220, "wrong": 0, "links": ["nccl"], "after_reset": 0}


@pytest.mark.parametrize("way", WAYS)
def test_both_may_send_first_in_one_graph(way: str, tmp_path: Path) -> None:
    """61 bundles of 120 MiB each way, which NCCL alone would not send before they are asked for;
    where two processes take turns on one GPU, each turn carries a few MiB only: of 16 there."""
    mega = 16 if "one GPU" in way else 120
    for result in run_between_hosts(way, "nccl_crossing", tmp_path, mega):
        assert result == [0, 61]


@pytest.mark.parametrize("way", WAYS)
def test_a_sender_waits_for_its_slots_and_nobody_for_more(way: str, tmp_path: Path) -> None:
    first, second = run_between_hosts(way, "nccl_pressure", tmp_path)
    assert first == {"waited from 0": True, "waited from 7": True}
    expected = [[0], [1], [2], [3]]
    assert second == {"got from 0": expected, "got from 7": expected}


@pytest.mark.parametrize("graphed", ["", "-graph"])
@pytest.mark.parametrize("call", ["put", "push", "commit", "get", "release"])
def test_calls_out_of_turn_are_errors_of_both(call: str, graphed: str, tmp_path: Path) -> None:
    results = run_between_hosts(WAYS[0], "nccl_order", tmp_path, call + graphed)
    who = 0 if call in ("put", "push", "commit") else 1
    assert results[who]["kind"] == "SlotOrderError", results
    assert results[who]["rank"] == who
    assert results[who]["operation"] == {"put": "begin"}.get(call, call)
    assert results[1 - who]["kind"] in ("SlotOrderError", "Aborted"), results
    for process, result in enumerate(results):
        assert result["seconds"] < 10
        assert result["again"] == [1 - process, 2 - process]


@pytest.mark.parametrize("way", WAYS)
def test_one_that_never_sends_is_named_at_the_deadline(way: str, tmp_path: Path) -> None:
    first, second = run_between_hosts(way, "nccl_silent", tmp_path)
    assert second["kind"] == "ExchangeTimeout", second
    assert second["rank"] == 1 and second["peer"] == 0
    assert (second["operation"], second["slot"]) == ("get", 0)
    assert (second["expected"], second["seen"]) == (1, 0)
    assert first["kind"] in ("ExchangeTimeout", "Aborted"), first
    assert 1.5 < second["seconds"] < 6 and first["seconds"] < 8
    assert first["again"] == [1, 2] and second["again"] == [0, 1]


@pytest.mark.parametrize("way", WAYS)
def test_an_abort_ends_the_waits_of_both(way: str, tmp_path: Path) -> None:
    for process, result in enumerate(run_between_hosts(way, "nccl_abort", tmp_path)):
        assert result["kind"] == "Aborted" and "enough" in result["text"], result
        assert result["seconds"] < 5
        assert result["again"] == [1 - process, 2 - process]


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_process_is_named_at_once(way: str, tmp_path: Path) -> None:
    first, killed = run_between_hosts(way, "nccl_traffic", tmp_path, len(way))
    assert killed == -9
    assert first["kind"] == "ProcessLost", first
    assert first["process"] == 1 and first["ranks"] == [1]
    assert first["seconds"] < 5 and first["closing"] < 5


@pytest.mark.parametrize("way", WAYS)
def test_changes_of_shape_leak_nothing(way: str, tmp_path: Path) -> None:
    for early, late in run_between_hosts(way, "cuda_churn", tmp_path, 200):
        assert late <= early + (8 << 20)
