"""With every step exact the node's latents are those of ComfyUI."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("comfy", reason="COMFYUI names no folder of ComfyUI")
import torch
from tiny_models import flux, sample, sd15, sdxl

#: Of latents of size one.
CLOSE = 1e-4


def same(model: Any, spread: Any, **run: Any) -> None:
    """What ComfyUI draws by itself, and the same again behind the node."""
    plain, split = sample(model, **run), sample(spread, **run)
    assert plain.isfinite().all() and plain.std() > 0.1
    assert (plain - split).abs().max() <= CLOSE * plain.std()


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral", "uni_pc"])
def test_samplers_that_evaluate_once_a_step(model: Any, spread: Any, sampler: str) -> None:
    same(model, spread(model), sampler=sampler)


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2s_ancestral", "dpm_fast"])
def test_others_run_exactly(model: Any, spread: Any, sampler: str, caplog: Any) -> None:
    """Also where settings ask for asynchronous steps."""
    same(model, spread(model, schedule="wavefront", warmup=1), sampler=sampler)
    assert "every step is run exactly" in caplog.text


@pytest.mark.parametrize(
    "run",
    [{"batch": 3}, {"cfg": 1.0}, {"tokens": 14}, {"denoise": 0.5}, {"scheduler": "karras"}],
    ids=str,
)
def test_runs(model: Any, spread: Any, run: Any) -> None:
    same(model, spread(model), **run)


def test_an_image_behind_another_one_of_other_size(model: Any, spread: Any) -> None:
    split = spread(model)
    same(model, split)
    same(model, split, batch=2)
    same(model, split)


@pytest.mark.parametrize("schedule", ["asyncdiff", "wavefront"])
def test_sdxl(spread: Any, schedule: str) -> None:
    model = sdxl()
    same(model, spread(model, schedule=schedule), sampler="dpmpp_2m")


def test_flux(spread: Any) -> None:
    model = flux()
    same(model, spread(model), scheduler="simple", cfg=1.0)


def test_flux_by_tokens(spread: Any) -> None:
    model = flux()
    split = spread(model, schedule="sequence", warmup=1)
    same(model, split, scheduler="simple", cfg=1.0)
    same(model, split, sampler="heun", scheduler="simple", cfg=1.0)


def test_conditions_on_devices_of_their_own(model: Any, spread: Any) -> None:
    same(model, spread(model, devices="cpu " * 4, guidance="split"))


def test_weights_that_are_cast_in_each_call(spread: Any) -> None:
    model = sd15(dtype=torch.float16)
    model.set_model_compute_dtype(torch.float32)
    same(model, spread(model))


@pytest.mark.parametrize("schedule", ["asyncdiff", "wavefront"])
def test_asynchronous_steps_are_close(model: Any, spread: Any, schedule: str) -> None:
    plain = sample(model, steps=20)
    split = sample(spread(model, schedule=schedule, warmup=4, exact_tail=1), steps=20)
    error = (plain - split).norm() / plain.norm()
    assert 1e-7 < error < 2e-2
