"""With every step exact the node's latents are those of ComfyUI."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("comfy", reason="COMFYUI names no folder of ComfyUI")
import torch
from tiny_models import flux, sample, sd15, sdxl

from asyncdiff.errors import TokensError

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


def test_settings_that_a_model_does_not_take(model: Any, spread: Any) -> None:
    with pytest.raises(TokensError, match="shared out"):
        sample(spread(model, schedule="sequence"))
    same(model, spread(model))


@pytest.mark.parametrize("components", [1, 2])
def test_conditions_on_devices_of_their_own(model: Any, spread: Any, components: int) -> None:
    devices = "cpu " * (2 * components)
    split = spread(model, devices=devices, components=components, guidance="split", warmup=1)
    same(model, split) if components == 1 else sample(split)
    exact = spread(model, devices=devices, guidance="split", schedule="wavefront")
    same(model, exact, sampler="dpmpp_2m")


def test_areas(model: Any, spread: Any) -> None:
    """A condition for a part of the picture is a call of other sizes."""
    same(model, spread(model), more={"area": (8, 16, 4, 0), "strength": 0.8})


def test_weights_that_are_cast_in_each_call(spread: Any) -> None:
    model = sd15(dtype=torch.float16)
    model.set_model_compute_dtype(torch.float32)
    same(model, spread(model))


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_asynchronous_steps_are_close(model: Any, spread: Any, sampler: str) -> None:
    """Waves are paid back what they misled the sampler by."""
    plain, errors = sample(model, sampler, steps=20), []
    for schedule in ("asyncdiff", "wavefront"):
        late = spread(model, schedule=schedule, warmup=4, exact_tail=1)
        split = sample(late, sampler, steps=20)
        errors.append(float((plain - split).norm() / plain.norm()))
    assert 1e-7 < errors[1] < errors[0] / 5 < 1e-2
