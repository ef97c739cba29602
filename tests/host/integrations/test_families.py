"""A fixed sample of the families of diffusers, in every run (all: benchmarks/pipelines/run.py)."""

from __future__ import annotations

import pytest
import reference
import torch
from families import FAMILIES, STEPS
from tiny_pipelines import draw

import asyncdiff


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str) -> None:
    """Exact with all steps exact, near with one, and as it was after ``restore()``."""
    pipe, call = FAMILIES[name]()
    pipe.set_progress_bar_config(disable=True)

    def run() -> torch.Tensor:
        drawn = draw(pipe, {"num_inference_steps": STEPS} | call)
        return torch.as_tensor(drawn[0] if isinstance(drawn, (list, tuple)) else drawn)

    want = run()
    assert want.isfinite().all()
    handle = asyncdiff.parallelize(
        pipe, devices=["cpu"] * 2, components=2, warmup=99, split="estimate"
    )
    assert reference.distance(run(), want) < 1e-5
    handle.configure(warmup=1)
    near = reference.distance(run(), want)
    assert 0 < near < 2
    handle.restore()
    assert torch.equal(run(), want)
