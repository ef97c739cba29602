"""Measures of batches of pictures, our rows of the fidelity benchmark, and `tune`."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncdiff
from asyncdiff import InputError, MetricError, TuneError
from asyncdiff.demo import model as demo_model
from asyncdiff.partition.cost import measure
from asyncdiff.partition.partition import partition
from asyncdiff.schedule.plan import build, rank_count
from asyncdiff.schedule.simulate import Timing, predict
from asyncdiff.tools import fidelity as measures
from asyncdiff.tools import tune as tuning
from asyncdiff.tools.fidelity import fidelity, learned_metrics
from asyncdiff.tools.prediction import predicted_speedup
from asyncdiff.tools.tune import tune
from asyncdiff.tools.tune_plot import draw
from fidelity import plots, rivals
from fidelity.macs import balanced, total
from fidelity.ours import Asynchronous, plain_work

ROOT = Path(__file__).resolve().parents[3]
PROMPTS = ["red heart", "cat face"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = demo_model.load()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_measures_of_known_pictures() -> None:
    g = torch.Generator().manual_seed(0)
    b = torch.rand(3, 3, 16, 16, generator=g)
    a = b.clone()
    a[0] += 0.1
    a[1] += 0.01
    a[2] += 0.001
    got = fidelity(a, b)
    assert got.psnr_db == pytest.approx((20 + 40 + 60) / 3, abs=1e-3)
    assert got.psnr_db_median == pytest.approx(40, abs=1e-3)
    assert got.psnr_db_p10 == pytest.approx(20, abs=1e-3)
    assert got.psnr_db_min == pytest.approx(20, abs=1e-3)
    want = float((a - b).norm() / b.norm())
    assert got.relative_l2 == pytest.approx(want, rel=1e-5)
    assert 0.9 < got.ssim < 1
    same = fidelity(b, b)
    assert same.psnr_db == math.inf and same.ssim == 1 and same.relative_l2 == 0
    named = fidelity(a, b, ["x"] * 3, {"count": lambda x, y, p: len(p)})
    assert named.learned == {"count": 3}
    with pytest.raises(InputError, match="batches of"):
        fidelity(a[:2], b)


def test_what_learned_metrics_lack_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measures, "find_spec", lambda name: None)
    found, missing = learned_metrics()
    assert not found and set(missing) == {"lpips", "fid", "clip_score"}
    assert missing["fid"].endswith("pip install torchmetrics torch-fidelity")
    monkeypatch.setattr(measures, "find_spec", lambda name: object())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MetricError, match=str(tmp_path)):
        measures.lpips()


def test_our_work_is_that_of_the_plan(pipe: Any) -> None:
    plain = plain_work(pipe, 50)
    assert plain.critical == plain.per_device == 50 * total(pipe)
    parts = balanced(pipe, 2)
    macs = [c.macs for c in parts.report().components]  # what both repeat is counted twice
    largest, both = max(macs), sum(macs)
    assert total(pipe) <= both < 1.01 * total(pipe)
    row = Asynchronous("x", "cpu", 2, 1, 5)
    work = row.work(pipe, {}, 50)
    assert work.critical == pytest.approx(5 * both + 45 * largest)
    assert work.per_device == pytest.approx(50 * largest)
    everything = Asynchronous("x", "cpu", 2, 1, 50).work(pipe, {}, 50)
    assert everything.critical == pytest.approx(50 * both)


def test_a_row_with_all_steps_exact_keeps_the_picture(pipe: Any) -> None:
    def call() -> dict[str, Any]:
        noise = [torch.Generator().manual_seed(i) for i in range(2)]
        return {"prompt": PROMPTS, "generator": noise}

    with torch.no_grad():
        want = pipe(**call(), num_inference_steps=3, output_type="pt").images
    exact = Asynchronous("x", "cpu", 2, 1, 3).run(pipe, call(), 3)
    assert fidelity(exact, want).psnr_db > 80
    hasty = Asynchronous("x", "cpu", 2, 1, 1).run(pipe, call(), 3)
    assert fidelity(hasty, want).psnr_db < 60


def test_who_is_better_than_us_is_said(tmp_path: Path) -> None:
    def row(method: str, devices: int, speedup: float, psnr: float) -> dict[str, Any]:
        return {
            "sampler": "ddim",
            "steps": 50,
            "guidance": 2.0,
            "method": method,
            "devices": devices,
            "speedup": speedup,
            "psnr_db": psnr,
        }

    rows = [
        row("asyncdiff N=2 S=1 w=1", 2, 1.9, 20),
        row("asyncdiff N=2 S=1 w=9", 2, 1.6, 28),
        row("fewer steps, 25", 1, 2.0, 21),
        row("patches", 4, 3.0, 50),
    ]
    (line,) = rivals.beaten(rows)
    assert "N=2 S=1 w=1 (1.90x, 20.0 dB) is beaten by fewer steps, 25 (2.00x, 21.0 dB)" in line
    plots.scatter(rows, tmp_path / "a.png")
    plots.sheet({"plain": torch.rand(2, 3, 8, 8)}, PROMPTS, tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size and (tmp_path / "b.png").stat().st_size


@pytest.mark.slow
def test_the_benchmark_writes_and_continues(tmp_path: Path) -> None:
    out = tmp_path / "fidelity.json"
    command = [sys.executable, str(ROOT / "benchmarks/fidelity/run.py"), "--quick"]
    command += ["--prompts", "1", "--steps", "2", "--samplers", "ddim", "--out", str(out)]
    first = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert first.returncode == 0, first.stderr
    document = json.loads(out.read_text())
    rows = document["figures"]["rows"]
    assert rows and all(r["psnr_db"] and r["speedup"] > 0 for r in rows)
    assert (tmp_path / "fidelity_ddim_2_5.png").exists()
    again = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    assert json.loads(out.read_text())["figures"]["rows"] == rows  # kept, not drawn again


@pytest.mark.slow
def test_tune_takes_the_fastest_that_is_good_enough(pipe: Any) -> None:
    kind = type(pipe)
    settings: dict[str, Any] = {"devices": ["cpu"], "num_inference_steps": 6}
    easy = tune(pipe, PROMPTS[:1], psnr_db=5, **settings)
    assert easy.chosen.arguments["warmup"] == 1
    assert easy.chosen.speedup == max(t.speedup for t in easy.tried)
    middle = easy.tried[0].fidelity.psnr_db  # of more exact steps
    hard = tune(pipe, PROMPTS[:1], psnr_db=middle - 0.01, **settings)
    assert hard.chosen.fidelity.psnr_db >= middle - 0.01
    good = [t for t in hard.tried if t.fidelity.psnr_db >= middle - 0.01]
    assert hard.chosen.speedup == max(t.speedup for t in good)
    with pytest.raises(TuneError, match=r"no setting on 2 devices keeps 200 dB; the best of \d+"):
        tune(pipe, PROMPTS[:1], psnr_db=200, **settings)
    assert type(pipe) is kind  # as it was


@pytest.mark.slow
def test_tune_tells_and_draws_what_it_does(pipe: Any, tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    found = tune(
        pipe, PROMPTS[:1], psnr_db=5, devices=["cpu"], num_inference_steps=4,
        progress=lambda *told: heard.append(told),
    )  # fmt: skip
    # From the first moment, and in steps: nothing that begins is left without an end.
    assert heard[0] == ("drawing with the plain pipeline", 0, 5)
    assert [done for what, done, _ in heard if what == heard[0][0]] == [0, 1, 2, 3, 4, 5]
    trials = {what for what, _, _ in heard if what.startswith("trying ")}
    assert len(trials) == len(found.tried)
    for what in {w for w, _, _ in heard}:
        *_, last = (told for told in heard if told[0] == what)
        assert last[1] == last[2], what
    path = tmp_path / "t.png"
    draw(found, path, psnr_db=5)
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_one_timing_of_the_denoiser_predicts_every_family(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a partition of its own for each would."""
    timed = []

    def measured(captured: Any, *rest: Any) -> Any:
        timed.append((captured, measure(captured, *rest)))
        return timed[-1][1]

    monkeypatch.setattr(tuning, "measure", measured)
    links = {"link_gb_per_s": 5.0, "link_latency_us": 5.0}
    monkeypatch.setattr(tuning, "links_between", lambda devices: links)
    found = tuning._families(pipe, [torch.device("cpu")], 3, 10, {})
    ((captured, costs),) = timed
    assert len(found) == 7
    for family in found:
        (settings, speedup) = next(x for x in family if x[0]["exact_tail"] == 2)
        ranks = rank_count(*(settings[k] for k in ("components", "stride", "schedule")))
        assert ranks <= 3 and settings["warmup"] == 1
        copies = ranks - settings["components"] + 1
        parts = partition(captured, settings["components"], "auto", costs=costs, copies=copies)
        timing = Timing.from_report(parts.report().to_dict(), **links)
        plan = build(steps=10, exchanges=parts.exchanges, **settings)
        assert speedup == predict(plan, timing).speedup


@pytest.mark.slow
def test_what_is_predicted_where_ranks_share_the_cpu(pipe: Any) -> None:
    with asyncdiff.parallelize(pipe, ["cpu"] * 2, warmup=2) as handle:
        pipe("house", num_inference_steps=4)
        chain = predicted_speedup(handle, 20)
        assert chain is not None and 1 < chain < 2
        # Exact steps that are split take half as long, all but the last.
        handle.configure(warmup=8)
        slow = predicted_speedup(handle, 20)
        handle.configure(exact_mode="split")
        split = predicted_speedup(handle, 20)
        assert slow is not None and split is not None and 1 < slow < split < 2
    with asyncdiff.parallelize(pipe, ["cpu"] * 2, components=2, split="estimate") as handle:
        pipe("house", num_inference_steps=2)
        assert predicted_speedup(handle, 20) is None
    with asyncdiff.parallelize(pipe, ["cpu"] * 4, guidance="split") as handle:
        pipe("house", num_inference_steps=2)
        assert predicted_speedup(handle, 20) is None


@pytest.mark.slow
def test_tune_calibrates_waves_on_other_prompts(pipe: Any) -> None:
    settings: dict[str, Any] = {"devices": ["cpu"], "num_inference_steps": 5, "psnr_db": 5}
    found = tune(pipe, PROMPTS[:1], calibrate_on=["house", "dog"] * 4, **settings)
    assert any(t.arguments["schedule"] == "wavefront" for t in found.tried)
    for trial in found.tried:
        if trial.arguments["schedule"] != "wavefront":
            assert trial.calibration is None
        assert trial.to_dict()["calibrated"] == ("calibrated" in str(trial))
        if trial.calibration is not None:
            assert trial.calibration.taken
            assert trial.calibration.shape.warmup == trial.arguments["warmup"]
    with pytest.raises(InputError, match="judge by others"):
        tune(pipe, PROMPTS, calibrate_on=["house", PROMPTS[1]] * 4, **settings)


def test_targets_that_make_no_sense(pipe: Any) -> None:
    for wrong in ({}, {"psnr_db": 30, "max_lpips": 0.1}):
        with pytest.raises(InputError, match="one of them"):
            tune(pipe, PROMPTS, **wrong)
    with pytest.raises(InputError, match="such as 30"):
        tune(pipe, PROMPTS, psnr_db=-1)
    with pytest.raises(InputError, match="needs prompts"):
        tune(pipe, [], psnr_db=30)
    with pytest.raises(InputError, match="at least two"):
        tune(pipe, PROMPTS, psnr_db=30, ranks=1, devices=["cpu"])
