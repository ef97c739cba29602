"""The benchmark of what the drop-in picks: its logic, on CPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from denoise.models import MODELS
from denoise.published_pipelines import PIPELINES, SAMPLERS, build

ROOT = Path(__file__).resolve().parents[3]


def test_every_published_denoiser_has_a_pipeline() -> None:
    missing = set(MODELS) - set(PIPELINES)
    assert missing == {"qwen", "qwen-half"}  # its text encoder's mask is none of its inputs
    for pipeline in PIPELINES.values():
        assert set(pipeline.samplers) <= set(SAMPLERS)


@pytest.mark.parametrize("key", ["tiny", "tiny-sdxl", "tiny-flux", "tiny-wan"])
def test_pipelines_draw_latents(key: str) -> None:
    drawn = []
    for sampler in PIPELINES[key].samplers:
        pipe, call = build(key, sampler, "cpu", torch.float32)
        latents = pipe(**call, num_inference_steps=2, generator=torch.Generator().manual_seed(0))[0]
        assert latents.isfinite().all()
        drawn.append(latents)
    assert len(drawn) == 1 or not torch.equal(*drawn)


@pytest.mark.slow
def test_it_runs_on_cpus(tmp_path: Path) -> None:
    out = tmp_path / "qualities.json"
    command = [sys.executable, str(ROOT / "benchmarks/denoise/qualities.py"), "--device", "cpu"]
    command += ["--models", "tiny", "--dtype", "float32", "--steps", "12", "--rounds", "2"]
    command += ["--compile", "graphs", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(out.read_text())["figures"].values()
    ways = found["ways"]
    assert set(ways) == {"plain", "one GPU", "balanced", "high", "exact"}
    assert ways["one GPU"]["speedup"] == 1.0 and ways["one GPU"]["distance"] == 0.0
    # Exact ways differ by rounding, the others by what was late.
    assert ways["exact"]["distance"] < 1e-5 < ways["high"]["distance"]
    assert "wavefront" in ways["balanced"]["picked"] and "split" in ways["exact"]["picked"]
