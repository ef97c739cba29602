"""The doctor: what it judges from made-up findings, and its probe of a child that dies."""

import json
import subprocess
import sys

import pytest
import torch

from asyncdiff.tools import doctor, link_speeds, speed

TOPOLOGY = (
    "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    "GPU0\t X \tNV18\tSYS\tPIX\t0-47\t0\t\tN/A\n"
    "GPU1\tNV18\t X \tPHB\tSYS\t0-47\t0\t\tN/A\n"
    "GPU2\tSYS\tPHB\t X \tSYS\t48-95\t1\t\tN/A\n"
    "NIC0\tPIX\tSYS\tSYS\t X \n\nLegend:\n\n  X    = Self\n  NV#  = Connection\n"
)


def gpu(index, capability="9.0", uuid=""):
    return {
        "index": index, "name": "H200", "uuid": uuid or f"u{index}", "memory_gib": 139.7,
        "capability": capability,
    }  # fmt: skip


def findings(**changes):
    found = {
        "python": "3.12.0", "system": "Linux", "cores": 16, "nvcc": None,
        "versions": {"torch": "2.11", "diffusers": "0.42", "transformers": "5.0"},
        "driver": {
            "version": "580.1", "hidden_by": None,
            "gpus": [{"index": i, "uuid": f"GPU-u{i}", "name": "H200"} for i in range(2)],
        },
        "probe_failed": None,
        "torch": {"version": "2.11", "cuda": "13.0", "architectures": ["sm_90"]},
        "gpus": [gpu(0), gpu(1)],
        "core": {"cuda_built": True, "build": {"cuda": "13.0"}},
        "links": [
            {"from": 0, "to": 1, "kind": "peer", "reason": None},
            {"from": 1, "to": 0, "kind": "peer", "reason": None},
        ],
    }  # fmt: skip
    return found | changes


def test_topology_in_words():
    matrix = doctor.read_topology(TOPOLOGY)
    assert matrix[(0, 1)] == matrix[(1, 0)] == "NVLink, 18 links"
    assert "sockets" in matrix[(0, 2)] and "host bridge" in matrix[(1, 2)]
    assert len(matrix) == 6
    assert doctor.read_topology("") == {}


def test_two_gpus_with_peer_access_leave_nothing_to_say():
    assert doctor.judge(findings()) == (["cuda:0", "cuda:1"], [])


def test_which_gpu_is_how_fast():
    """By a matrix product and a pass over memory on each."""
    rates = [{"tflops": 400.0, "gb_per_s": 1000.0}, {"tflops": 100.0, "gb_per_s": 1000.0}]
    assert speed.compare(rates) == [1.0, 0.5] and speed.compare([]) == []
    speeds = [r | {"speed": s} for r, s in zip(rates, speed.compare(rates), strict=True)]
    told = doctor.tell(findings(speeds=speeds) | {"use": ["cuda:0"], "remarks": []})
    assert "400 TFLOPS, 1000 GB/s, 100 % of the fastest" in told
    assert "100 TFLOPS, 1000 GB/s, 50 % of the fastest" in told
    _, remarks = doctor.judge(findings(speeds=[], speeds_error="no memory"))
    assert remarks == ["how fast GPUs are could not be measured: no memory"]
    assert "TFLOPS" not in doctor.tell(findings() | {"use": [], "remarks": []})
    found = speed.rates(torch.device("cpu"), rows=64, nbytes=1 << 16)
    assert found["tflops"] > 0 and found["gb_per_s"] > 0


def test_how_fast_links_are_is_told():
    """Alone, both ways and all at once: by themselves, and where they share a way."""
    links = [
        {"from": a, "to": b, "kind": "peer", "reason": None, "latency_us": 5.25}
        | {"gb_per_s": {"alone": 25.0, "both_ways": 24.0, "all_pairs": share}}
        for a, b, share in ((0, 1, 23.0), (1, 0, 8.5))
    ]
    use, remarks = doctor.judge(findings(links=links))
    assert use == ["cuda:0", "cuda:1"]
    (remark,) = remarks
    assert remark == ("cuda:1 to cuda:0 has 8.5 of 25 GB/s while all pairs send: they share a way")
    told = doctor.tell(findings(links=links) | {"use": use, "remarks": remarks})
    assert "peer, 25 GB/s; 24 both ways at once, 8.5 all pairs at once; 5.25 µs" in told


def test_simulated_links_are_said_to_be(monkeypatch):
    links = [{"from": 0, "to": 1, "kind": "simulated", "reason": "1GB/s,9us is simulated"}]
    _, remarks = doctor.judge(findings(links=links, simulated_link="1GB/s,9us"))
    assert remarks == ["links are simulated: ASYNCDIFF_LINK=1GB/s,9us"]
    monkeypatch.setenv("ASYNCDIFF_LINK", "1GB/s,9us,all")
    assert doctor._probe_core()["simulated_link"] == "1GB/s,9us,all"
    monkeypatch.setenv("ASYNCDIFF_LINK", "none")
    assert "link 'none': write BANDWIDTH" in doctor._probe_core()["links_error"]


def test_links_are_measured_through_channels(monkeypatch):
    monkeypatch.setenv("ASYNCDIFF_LINK", "500MB/s,1ms,both")
    links = [{"from": a, "to": b, "kind": "simulated"} for a, b in ((0, 1), (1, 0))]
    found = link_speeds.add_speeds(links, "cpu")["links"]
    assert [(x["from"], x["to"], x["kind"]) for x in found] == [
        (0, 1, "simulated"),
        (1, 0, "simulated"),
    ]
    for link in found:
        speed = link["gb_per_s"]
        assert 0 < speed["alone"] < 0.6 and speed["both_ways"] < 0.5
        assert link["latency_us"] >= 1000
    monkeypatch.setenv("ASYNCDIFF_LINK", "fast")
    assert "ASYNCDIFF_LINK" in link_speeds.add_speeds(links, "cpu")["links_error"]


@pytest.mark.parametrize(
    "changes,use,said",
    [
        (
            {"gpus": [], "driver": {"version": None, "hidden_by": None, "gpus": []}},
            ["cpu"],
            "no GPU",
        ),
        ({"gpus": [], "torch": {"version": "2.13+cpu", "cuda": None}}, ["cpu"], "without CUDA"),
        (
            {"gpus": [], "torch": {"version": "2", "cuda": "13", "error": "old driver"}},
            ["cpu"],
            "old",
        ),
        ({"core": {"cuda_built": False, "build": {}}}, ["cpu"], "ASYNCDIFF_CUDA=on"),
        ({"core": {"error": "no module"}}, [], "no module"),
        ({"torch": {"error": "broken"}, "gpus": []}, [], "broken"),
        ({"gpus": [gpu(0), gpu(1, "5.0")]}, ["cuda:0"], "no code for sm_50"),
        ({"gpus": [gpu(0)]}, ["cuda:0"], "1 of 2 GPUs unused"),
        ({"links_error": "probe lost"}, ["cuda:0", "cuda:1"], "probe lost"),
        ({"probe_failed": "did not answer"}, ["cuda:0", "cuda:1"], "did not answer"),
        (
            {"links": [{"from": 0, "to": 1, "kind": "staged", "reason": "no peer access"}]},
            ["cuda:0", "cuda:1"],
            "staged memory: no peer access",
        ),
    ],
)
def test_what_is_not_used_has_a_reason(changes, use, said):
    found = findings(**changes)
    used, remarks = doctor.judge(found)
    assert used == use and any(said in r for r in remarks)
    text = doctor.tell(found | {"use": used, "remarks": remarks})
    assert said in text and "will use" in text


def test_buses_follow_the_uuid_not_the_visible_number(monkeypatch):
    monkeypatch.setattr(doctor, "_output", lambda *command: TOPOLOGY)
    found = findings(gpus=[gpu(0, uuid="u2"), gpu(1, uuid="u0")])
    found["driver"]["gpus"].append({"index": 2, "uuid": "GPU-u2", "name": "H200"})
    assert "sockets" in doctor._buses(found)[(0, 1)]


@pytest.mark.slow
def test_a_child_that_dies_or_hangs_keeps_what_it_had_said(monkeypatch):
    def run(code):
        real = subprocess.run
        monkeypatch.setattr(
            doctor.subprocess, "run",
            lambda command, **kw: real([sys.executable, "-c", code], **kw),
        )  # fmt: skip
        found = doctor.probe(seconds=5)
        monkeypatch.undo()
        return found

    say = 'print(\'{"torch": {"version": "1"}}\', flush=True); '
    found = run(say + "import os; os.abort()")
    assert found["torch"] == {"version": "1"} and "-6" in found["probe_failed"]
    found = run(say + "import time; time.sleep(60)")
    assert found["torch"] == {"version": "1"} and "within 5 s" in found["probe_failed"]


def test_this_machine():
    steps = []
    found = doctor.collect(lambda: steps.append(1))
    assert len(steps) == 4 and found["probe_failed"] is None
    assert {"use", "remarks", "torch", "core", "driver"} <= set(found)
    json.dumps(found)
    assert "will use" in doctor.tell(found)
