"""The benchmark of simulated links: what rows say, how a run is continued, and its table."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from toys import toy, toy_call

import asyncdiff_core as core
import documents
import guide_tables
import results_file
from asyncdiff.graph.capture import capture
from asyncdiff.graph.signature import parse
from asyncdiff.partition.cost import estimate
from asyncdiff.partition.links import Link, Links
from asyncdiff.partition.partition import Partition, partition
from asyncdiff.runtime.exchange.compression.choice import PACKED_PER_MS, Choice
from asyncdiff.runtime.exchange.compression.codec import crossing
from denoise import links, links_predicted, table
from denoise.timings import Timings

ROOT = Path(__file__).resolve().parents[3]


def timings(ms: list[float], exposed: list[float]) -> Timings:
    made = Timings()
    made.ms, made.exposed = ms, exposed
    return made


def denoiser(link: str | None) -> Any:
    report = SimpleNamespace(simulated_link=link, exchange_bytes_per_tick=3 << 20, cuda_graphs=True)
    parts = SimpleNamespace(components=[SimpleNamespace(ms=9.0), SimpleNamespace(ms=10.0)])
    return SimpleNamespace(
        report=lambda: report,
        partition=SimpleNamespace(report=lambda: parts, cuts=("here",)),
    )


def test_a_tick_is_what_a_further_step_takes() -> None:
    each = [timings([200.0, 210.0], [0.1]), timings([400.0, 430.0], [0.5, 0.7])]
    row = links.row(each, [10, 30], denoiser("6GB/s,10us"))
    assert row["tick_ms"] == {"median": 10.5, "min": 10.0, "max": 11.0}
    assert row["exposed_ms"]["median"] == 0.6
    assert row["exposed_share"] == pytest.approx(0.6 / 10.5, abs=1e-4)
    assert row["simulated"] and row["link"] == "6GB/s,10us" and row["exchange_mib"] == 3.0
    real = links.row([timings([100.0], []), timings([260.0], [])], [10, 30], denoiser(None))
    assert not real["simulated"] and "exposed_share" not in real
    rows = {links.name_of("off", "none"): real, links.name_of("6GB/s,10us", "fp8"): row}
    links.compare(rows)
    assert real["slower_share"] == 0
    assert row["slower_share"] == pytest.approx(1 - 8 / 10.5, abs=1e-4)


def test_links_are_links_and_the_environment_is_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("ASYNCDIFF_LINK", raising=False)
    for link in links.LINKS:
        with links.over(link):
            assert (core.simulated_link() is None) == (link == "off")
    assert core.simulated_link() is None
    with links.over("1GB/s,1us"), links.over("off"):
        assert core.simulated_link() is None


def test_results_say_that_links_were_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASYNCDIFF_LINK", raising=False)
    assert "simulated_link" not in results_file.environment()
    monkeypatch.setenv("ASYNCDIFF_LINK", "6GB/s,10us")
    assert results_file.environment()["simulated_link"] == "6GB/s,10us"


def test_the_table_has_ways_beside_each_other() -> None:
    def row(title: str, way: str, ms: float) -> dict[str, Any]:
        tick = {"median": ms, "min": ms, "max": ms}
        shares = {"exposed_share": 0.031, "slower_share": 0.02}
        return {"title": title, "compress": way, "tick_ms": tick, "exchange_mib": ms, **shares}

    rows = [row("real", "none", 10), row("slow", "none", 20), row("slow", "fp8", 12)]
    model = {"title": "SDXL", "rows": {str(i): r for i, r in enumerate(rows)}}
    text = table.links({"sdxl": model})
    assert "### SDXL" in text and "fp8: ms a tick" in text
    (line,) = (x for x in text.splitlines() if x.startswith("| slow"))
    assert [c.strip() for c in line.strip("|").split("|")] == [
        "slow", "20.00", "2.0 %", "3.1 %", "20.0", "12.00", "2.0 %", "3.1 %", "12.0",
    ]  # fmt: skip


def test_what_is_measured_and_what_is_predicted_stand_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(documents, "RESULTS", tmp_path)
    tick = {"median": 10.0, "min": 10.0, "max": 10.0}
    row = {"title": "slow", "compress": "none", "tick_ms": tick, "exchange_mib": 1.0}
    figures = {"sdxl": {"title": "SDXL", "rows": {"x": row}}}
    environment = {"gpus": ["H200"] * 2, "command": "links.py", "torch": "2", "commit": "abc"}
    document = {"environment": environment, "figures": figures}
    without = {"environment": environment | {"gpus": []}, "figures": figures}
    (tmp_path / "links_predicted.json").write_text(json.dumps(without))
    (tmp_path / "links_2gpu.json").write_text(json.dumps(document))
    measured, predicted = guide_tables.links().split("**Predicted**, not measured: ")
    assert measured.startswith("Measured on 2 × H200, over simulated links: ")
    assert "### SDXL\n" in measured and "### SDXL, predicted\n" in predicted


def test_ticks_are_predicted_by_what_has_to_leave() -> None:
    assert links_predicted.link_of("off") == links_predicted.NVLINK
    assert links_predicted.link_of("10Gb/s,50us,all") == Link(1.25e6, 0.05)
    call = parse(toy(), (), toy_call())
    captured = capture(toy(), call)
    costs = links_predicted.scaled(captured, 20.0)
    assert sum(costs.ms[n] for n in captured.nodes if captured.each_run(n)) == pytest.approx(20)
    rows = links_predicted.rows_of(captured, costs, ["none", "fp8"])
    assert len(rows) == 2 * len(links.LINKS)
    for row in rows.values():
        assert row["predicted"] and row["tick_ms"]["median"] >= max(row["component_ms"]) - 1e-3
        assert sum(row["component_ms"]) == pytest.approx(20, rel=0.01)


class Boundary(nn.Module):
    """What SDXL's first half sends at 1024², in float16: 97.5 MiB early, and 5 MiB at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.rest = nn.Linear(1280, 39 * 640), nn.Linear(1280, 1280)
        self.second = nn.Linear(39 * 640, 1280)

    def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor]:
        early = self.early(sample)
        return (self.second(early) + self.rest(sample),)


def halves() -> Partition:
    """SDXL's, as far as it matters, with the times that they were measured at over 6 GB/s."""
    module = Boundary().to("meta", torch.float16).requires_grad_(False)
    sample = torch.empty(2, 1024, 1280, dtype=torch.float16, device="meta")
    captured = capture(module, parse(module, (), {"sample": sample}))
    ms = dict.fromkeys(captured.nodes, 0.0)
    at = {captured.module_path(n): n for n in captured.nodes if "linear" in n.name}
    ms |= {at["early"]: 1.0, at["rest"]: 18.685, at["second"]: 20.92}
    costs = dataclasses.replace(estimate(captured), ms=ms)
    return partition(captured, 2, [["early", "rest"], ["second"]], costs=costs)


def test_auto_compresses_where_measured_ticks_were_shorter_for_it() -> None:
    """And predictions go by the same speed of compressing."""
    parts = halves()
    assert parts.boundaries[0, 1].nbytes == 102.5 * 2**20
    document = json.loads((ROOT / "benchmarks/results/links_2gpu.json").read_text())
    rows = document["figures"]["sdxl"]["rows"]
    shorter, found = {}, {}
    for link in links.LINKS:
        ways = [rows.get(links.name_of(link, way)) for way in links_predicted.WAYS]
        if None not in ways:
            none, fp8 = (row["tick_ms"]["median"] for row in ways)
            shorter[link] = fp8 < none
            known = Links(Link(1e9), {(0, 1): links_predicted.link_of(link)})
            found[link] = Choice("auto", "cuda").crossing(parts, known, 1) is crossing
    assert found == shorter and {True, False} == set(found.values())
    assert links_predicted.PACKED_PER_MS is PACKED_PER_MS


@pytest.mark.slow
def test_a_run_is_continued(tmp_path: Path) -> None:
    out = tmp_path / "links.json"
    script = str(ROOT / "benchmarks/denoise/links.py")
    command = [sys.executable, script, "--device", "cpu", "--models", "tiny"]
    command += ["--dtype", "float32", "--steps", "3", "6", "--rounds", "1", "--out", str(out)]
    command += ["--compress", "none", "--links"]
    subprocess.run([*command, "off"], check=True)
    subprocess.run([*command, "off", "100MB/s,1ms"], check=True)
    figures = json.loads(out.read_text())["figures"]["tiny"]
    assert list(figures["rows"]) == ["off none", "100MB/s,1ms none"]
    slow = figures["rows"]["100MB/s,1ms none"]
    assert slow["simulated"] and slow["link"] == "0.1GB/s,1000us" and "slower_share" in slow
    wrong = subprocess.run([*command, "slow"], capture_output=True, text=True, check=False)
    assert wrong.returncode and "write BANDWIDTH,LATENCY" in wrong.stderr
