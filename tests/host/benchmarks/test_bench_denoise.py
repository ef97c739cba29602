"""The denoise benchmark's logic, on the CPU: its figures mean nothing there."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import results_file
import tables
from asyncdiff.schedule.plan import build
from denoise import compile, merge, models, table, timings
from denoise.settings import Setting

ROOT = Path(__file__).resolve().parents[3]


def test_settings_as_text() -> None:
    plain = Setting.parse("2,1,1")
    assert plain == Setting(2, 1, 1) and plain.name == "N=2 S=1 w=1" and plain.ranks == 2
    all_of_it = Setting.parse("3,2,9,waves,split,splitwarm,tail=2")
    assert all_of_it.name == "N=3 S=2 w=9 tail=2 waves split splitwarm"
    late = Setting.parse("3,1,1,waves,delay=2")
    assert late.delay == 2 and late.name == "N=3 S=1 w=1 delay=2 waves"
    assert late.team != Setting.parse("3,1,1,waves").team
    assert all_of_it.ranks == 6 and all_of_it.schedule == "wavefront"
    assert Setting.parse("3,2,1").ranks == 4
    # Exact steps may change between generations; ranks may not.
    assert Setting.parse("3,2,1,waves,split").team == all_of_it.team != Setting.parse("3,2,9").team
    # First generations may be short, but have exact ones and ticks in both slots.
    assert Setting.parse("2,1,1").enough(6) == 6 and Setting.parse("3,2,9,tail=1").enough(6) == 22
    for wrong in ("2,1", "2,1,1,often", "2,1,1,delay", "2,1,1,waves=2", "a,b,c"):
        with pytest.raises(ValueError):
            Setting.parse(wrong)


@pytest.mark.slow
def test_written_weights_are_timed(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    out = tmp_path / "written.json"
    command = [sys.executable, str(ROOT / "benchmarks/denoise/written.py"), "--model", "tiny"]
    command += ["--devices", "cpu", "cpu", "--dtype", "float32", "--size", "64"]
    command += ["--repeats", "2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    (figures,) = json.loads(out.read_text())["figures"].values()
    for change in ("nothing", "state dict", "scale", "replaced", "fused"):
        assert figures[change]["exports"] == 0 and len(figures[change]["each_ms"]) == 2


@pytest.mark.slow
def test_compiling_is_measured_cold_and_warm(tmp_path: Path) -> None:
    out = tmp_path / "compile.json"
    command = [sys.executable, str(ROOT / "benchmarks/denoise/compile.py"), "--device", "cpu"]
    command += ["--models", "tiny", "--ways", "graphs", "--dtype", "float32", "--steps", "3"]
    command += ["--rounds", "2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    ways = json.loads(out.read_text())["figures"]["tiny"]["ways"]["graphs"]
    cold, warm = ways["cold"], ways["warm"]
    assert cold["phases_s"]["export"] > 0 and "export" not in warm["phases_s"]
    assert sum(cold["phases_s"].values()) <= cold["total_s"] + 0.1
    assert warm["distance_to_eager"] < 1e-5 and not warm["compiled"]
    again = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert json.loads(out.read_text())["figures"]["tiny"]["ways"]["graphs"] == ways
    assert again.returncode == 0


def test_regions_are_compared_with_whole_components() -> None:
    def figures(total: float, compile: float, ms: float) -> dict[str, Any]:
        return {"total_s": total, "phases_s": {"compile": compile}, "ms_a_step": {"median": ms}}

    ways = {"whole": {"cold": figures(100, 80, 20.0)}, "regions": {"cold": figures(50, 20, 20.2)}}
    want = {"step_cold": 1.01, "total_cold": 0.5, "compile_cold": 0.25}
    assert compile.compared(ways) == want  # and nothing of what was not measured
    ways["regions"]["warm"] = {"failed": "exit code 1"}
    assert compile.compared(ways) == want


@pytest.mark.slow
def test_every_way_gives_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "denoise.json"
    command = [sys.executable, str(ROOT / "benchmarks/denoise/run.py"), "--device", "cpu"]
    command += ["--models", "tiny", "--dtype", "float32", "--steps", "5", "4", "--rounds", "2"]
    command += ["--out", str(out), "--schedules", "2,1,1", "2,1,5", "2,1,3,splitwarm,tail=1"]
    command += ["1,1,1,split", "2,1,1,waves", "2,2,1", "--predict", "2", "3"]
    command += ["--predict-steps", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    # 4 steps have no 5 exact ones: said, not hidden.
    assert done.returncode != 0 and "warmup=5 exceeds the 4 steps" in done.stderr
    command[command.index("4")] = "6"
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())["figures"]["tiny"]
    rows = {k: v for k, v in figures.items() if k.startswith("N=")}
    assert len(rows) == 6
    for name, row in rows.items():
        assert row["ms_a_step"]["median"] > 0 and row["6 steps"]["ms_a_step"]["median"] > 0
        assert row["shared_gpus"] and "speedup_over_eager" not in row
        exact = name in ("N=2 S=1 w=5", "N=1 S=1 w=1 split")
        assert (row["distance_to_eager"] < 1e-5) == exact, name
    # N=1 exchanges nothing.
    assert rows["N=1 S=1 w=1 split"]["exchange_mib_per_tick"] == 0
    # Guidance in two calls a step.
    other = tmp_path / "branches.json"
    command = [
        *command[:4],
        "--models",
        "tiny-wan",
        "tiny-qwen",
        "--dtype",
        "float32",
        "--steps",
        "5",
    ]
    command += ["--rounds", "1", "--out", str(other), "--schedules", "2,1,1", "1,1,1,split"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    for found in json.loads(other.read_text())["figures"].values():
        assert 1e-5 < found["N=2 S=1 w=1"]["distance_to_eager"] < 0.2
        assert found["N=1 S=1 w=1 split"]["distance_to_eager"] < 1e-5
    rows = figures["predicted"]["rows"]
    # Too few steps for nine exact ones.
    assert list(rows) == ["N=2 S=1 w=1", "N=3 S=1 w=1", "N=2 S=2 w=1", "N=3 S=2 w=1"]
    assert rows["N=3 S=2 w=1"]["gpus"] == 4
    # One exact step of five, and the others at the pace of the slowest component.
    slowest, both = (f(rows["N=2 S=1 w=1"]["component_ms_alone"]) for f in (max, sum))
    ideal = (both + 4 * slowest) / 5 + figures["predicted"]["update_ms"]
    assert rows["N=2 S=1 w=1"]["ms_a_step"] == pytest.approx(ideal, rel=0.2)
    # A further run adds its models; one on other software begins anew.
    document = json.loads(out.read_text())
    document["figures"]["flux"] = {"title": "kept"}
    out.write_text(json.dumps(document))
    assert list(results_file.continued(out)) == ["tiny", "flux"]
    document["environment"]["torch"] = "1.0"
    out.write_text(json.dumps(document))
    assert results_file.continued(out) == {}
    rows = {k: v for k, v in figures.items() if k.startswith("N=")}
    plan = build(2, 1, 1, 5)
    assert len(rows["N=2 S=1 w=1"]["gmacs_per_step_by_rank"]) == plan.ranks


def test_a_denoiser_gets_the_timesteps_of_its_pipeline() -> None:
    inputs = {"hidden_states": torch.randn(1, 4, 8), "timestep": torch.ones(1, dtype=torch.float16)}
    flux, sd3 = (models.MODELS[key].loop(inputs, 5) for key in ("flux", "sd3"))
    seen: list[torch.Tensor] = []

    def denoise(kwargs: dict[str, torch.Tensor], call: int) -> torch.Tensor:
        seen.append(kwargs["timestep"])
        return kwargs["hidden_states"]

    flux(denoise)
    # FLUX multiplies them by 1000 again, in float16.
    assert [float(t[0]) for t in seen] == pytest.approx(flux.scheduler.timesteps / 1000, rel=1e-3)
    assert torch.equal(sd3.timesteps.long(), sd3.scheduler.timesteps)
    # Views, as with most pipelines: an engine need not look at their values.
    begins = [t.data_ptr() for t in flux.timesteps]
    assert [t.data_ptr() for t in seen] == begins and len(set(begins)) == 5


def test_a_loop_of_nan_is_not_timed() -> None:
    way = SimpleNamespace(run=lambda loop: torch.full((2,), torch.nan))
    with pytest.raises(ArithmeticError, match="not finite"):
        timings.Timings().take(way, cast(Any, None))


@pytest.mark.slow
def test_quantised_weights_are_timed_like_others(tmp_path: Path) -> None:
    """On one device and on two; each component holds its share in float8."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    out = tmp_path / "denoise.json"
    command = [sys.executable, str(ROOT / "benchmarks/denoise/run.py"), "--device", "cpu"]
    command += ["--models", "tiny-float8", "--dtype", "bfloat16", "--steps", "4", "--rounds", "1"]
    command += ["--out", str(out), "--schedules", "2,1,1", "2,1,4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())["figures"]["tiny-float8"]
    assert figures["title"].endswith("float8")
    assert (
        figures["N=2 S=1 w=4"]["distance_to_eager"]
        == 0
        < figures["N=2 S=1 w=1"]["distance_to_eager"]
    )


def test_denoisers_with_quantised_weights() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    plain, tiny = (models.TRIES[k].build("cpu", torch.bfloat16) for k in ("tiny", "tiny-float8"))
    layers = dict(tiny.named_modules())
    kinds = {
        name: type(layers[name].weight).__name__
        for name, layer in plain.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    assert set(kinds.values()) == {"Float8Tensor"}
    call = models.TINY.inputs(tiny)
    assert tiny(**call)[0].isfinite().all()
    published = models.QUANTISED["flux-float8-dynamic"]
    assert published.title == "FLUX.1-dev, 1024², float8 dynamic"
    with pytest.raises(SystemExit, match="--dtype bfloat16"):
        models.TINY.with_weights("float8 dynamic").build("cpu", torch.float16)


@pytest.mark.slow
def test_runs_beside_each_other_are_put_batch(tmp_path: Path) -> None:
    """They prepare at once, time one after another, and one document comes of it."""
    script = str(ROOT / "benchmarks/denoise/run.py")
    command = [sys.executable, script, "--device", "cpu", "--models", "tiny", "--dtype", "float32"]
    command += ["--steps", "4", "6", "3", "--rounds", "2", "--eager-rounds", "1"]
    command += ["--further-ranks", "2", "--lock", str(tmp_path / "lock")]
    settings = {"a": ["2,1,1", "2,1,2"], "b": ["3,1,1", "2,1,1"]}
    outs = {name: tmp_path / f"{name}.json" for name in settings}
    runs = [
        subprocess.Popen(
            [*command, "--out", str(outs[name]), "--schedules", *wanted],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, wanted in settings.items()
    ]
    for run in runs:
        _, errors = run.communicate(timeout=250)
        assert run.returncode == 0, errors
    documents = {name: json.loads(path.read_text()) for name, path in outs.items()}
    merged = merge.merge(list(documents.values()))["figures"]["tiny"]
    first, last = (documents[name]["figures"]["tiny"] for name in settings)
    assert merged["eager"] == first["eager"] and merged["N=2 S=1 w=1"] == last["N=2 S=1 w=1"]
    assert {"N=3 S=1 w=1", "N=2 S=1 w=2"} < set(merged)
    assert merged["command"].count("run.py") == 2
    # Further lengths are for few ranks, and one round of eager is enough to compare with.
    assert "6 steps" in merged["N=2 S=1 w=1"] and "6 steps" not in merged["N=3 S=1 w=1"]
    here = documents["b"]["environment"]
    here["torch"] = "1.0"
    with pytest.raises(ValueError, match="torch differ"):
        merge.merge(list(documents.values()))
    here["torch"] = documents["a"]["environment"]["torch"]
    documents["a"]["environment"]["gpus"] = ["GPU", "GPU"]
    for gpus, fits in ((["GPU"], True), (["another"], False), (["GPU"] * 3, False)):
        here["gpus"] = gpus
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="gpus differ"):
            merge.merge(list(documents.values()))


def test_every_row_of_the_committed_results_has_its_commit() -> None:
    text = tables.speeds()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| N=")]
    assert len(rows) > 100
    for setting, *_, commits in rows:
        known = re.compile(r"[0-9a-f]{7,}\+?|unknown")  # + : files differed from the commit
        assert all(known.fullmatch(c.strip()) for c in commits.split(",")), setting


def test_the_readme_shows_eight_rows() -> None:
    lines = tables.glance().splitlines()
    assert len(lines) == 2 + 8
    assert all("**" in line for line in lines[2:])  # two GPUs were measured of each


def test_what_a_tick_takes_follows_from_loops_of_few_and_many_exact_steps() -> None:
    exact, tick, steps = 10.0, 2.5, 50

    def loop(w: int) -> dict[str, object]:
        ms = (w * exact + (steps - w) * tick) / steps
        return {"mode": "graph", "devices": ["cuda:0"], "ms_a_step": {"median": ms}}

    model = {"title": "a model", "steps": steps, "rounds": 1, "eager": {"memory_mib": {}}}
    model |= {"graph": {"ms_a_step": {"median": exact}}, "N=4 S=1 w=1": loop(1)}
    assert "efficiency" not in table.details({"model": model})
    model["N=4 S=1 w=9"] = loop(9)
    assert "| efficiency of a steady tick | ≥ 1.000 |" in table.details({"model": model})
    known = {"median": 0.9, "min": 0.8, "max": 1.0}
    model["N=4 S=1 w=1"] = loop(1) | {"steady": {"efficiency": known}}
    assert "| 0.900 (0.800 to 1.000) |" in table.details({"model": model})


def test_lengths_that_were_not_run() -> None:
    def loop(ratio: float, commit: str) -> dict[str, object]:
        ratios = {"speedup_over_graph": {"median": ratio}}
        return {"commit": commit, "ms_a_step": {"median": 1.0}, **ratios}

    first = {"title": "a", "steps": 50, "rounds": 1, "eager": {"memory_mib": {"device": []}}}
    rest = {"mode": "graph", "devices": ["cuda:0"]}
    row = "N=2 S=1 w=1"
    further = {"25 steps": loop(1.8, "b"), "100 steps": loop(1.95, "a")}
    whole = first | {row: rest | loop(1.9, "a") | further}
    part = first | {row: rest | loop(1.7, "c") | {"25 steps": loop(1.6, "c")}}
    text = table.speeds({"whole": whole, "part": part})
    assert "times one GPU in 25 steps | 50 steps | 100 steps" in text
    assert f"| {row} | 1 | 1.0 | 1.80 | 1.90 | 1.95 | a, b |" in text
    assert f"| {row} | 1 | 1.0 | 1.60 | 1.70 | c |" in text
