"""The clean image of a prediction, against the schedulers' own."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from asyncdiff import SchedulerError
from asyncdiff.sampling.clean_image import clean_image

KINDS = ("epsilon", "sample", "v_prediction")


def made(name: str, steps: int = 7, **options: Any) -> Any:
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(steps)
    return scheduler


def check(scheduler: Any, own: Any) -> None:
    """``own(scheduler, prediction, x, step)`` is the scheduler's x0, of unscaled latents x."""
    clean = clean_image(scheduler)
    assert len(clean.of_input) == len(scheduler.timesteps)
    for k, t in enumerate(scheduler.timesteps):
        x, prediction = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.manual_seed(k))
        scheduler._step_index = k
        if hasattr(scheduler, "is_scale_input_called"):
            scheduler.is_scale_input_called = True
        want = own(scheduler, prediction, x, t)
        scheduler._step_index = k
        z = scheduler.scale_model_input(x, t)
        got = clean.x0(k, z, prediction)
        torch.testing.assert_close(got, want.double(), rtol=1e-4, atol=1e-4)
        back = clean.prediction(k, z, got)
        torch.testing.assert_close(back, prediction, rtol=1e-9, atol=1e-9)


def by_step(scheduler: Any, prediction: torch.Tensor, x: torch.Tensor, t: Any) -> torch.Tensor:
    return scheduler.step(prediction, t, x).pred_original_sample


def by_conversion(
    scheduler: Any, prediction: torch.Tensor, x: torch.Tensor, t: Any
) -> torch.Tensor:
    return scheduler.convert_model_output(prediction, sample=x)


@pytest.mark.parametrize("kind", KINDS)
def test_variance_preserving(kind: str) -> None:
    check(made("DDIMScheduler", prediction_type=kind, clip_sample=False), by_step)
    check(made("DDPMScheduler", prediction_type=kind, clip_sample=False), by_step)


@pytest.mark.parametrize("kind", ("epsilon", "v_prediction"))
@pytest.mark.parametrize("karras", [False, True])
def test_inputs_scaled_by_the_noise(kind: str, karras: bool) -> None:
    options = {"prediction_type": kind, "use_karras_sigmas": karras}
    check(made("EulerDiscreteScheduler", **options), by_step)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_converted_predictions(name: str, kind: str) -> None:
    check(made(name, prediction_type=kind), by_conversion)
    check(made(name, prediction_type=kind, use_karras_sigmas=True), by_conversion)


@pytest.mark.parametrize("kind", ("epsilon", "flow_prediction"))
def test_straight_flows_of_multistep_schedulers(kind: str) -> None:
    options = {"prediction_type": kind, "use_flow_sigmas": True, "flow_shift": 3.0}
    check(made("DPMSolverMultistepScheduler", **options), by_conversion)


def test_zero_terminal_snr() -> None:
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    check(made("DDIMScheduler", prediction_type="v_prediction", clip_sample=False, **options),
          by_step)  # fmt: skip
    with pytest.raises(SchedulerError, match=r"step 0 .*v prediction"):
        clean_image(made("DDIMScheduler", **options))


def test_flow_matching() -> None:
    """x = (1 − σ)·x0 + σ·ε, and the denoiser predicts ε − x0; some pipelines turn its sign."""
    scheduler = made("FlowMatchEulerDiscreteScheduler", shift=3.0)
    for backwards in (False, True):
        clean = clean_image(scheduler, backwards=backwards)
        x0, noise = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.manual_seed(0))
        for k, sigma in enumerate(scheduler.sigmas[:-1].double()):
            flow = x0 - noise if backwards else noise - x0
            got = clean.x0(k, (1 - sigma) * x0 + sigma * noise, flow)
            torch.testing.assert_close(got, x0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ("epsilon", "v_prediction"))
def test_preconditioned(kind: str) -> None:
    def own(scheduler: Any, prediction: torch.Tensor, x: torch.Tensor, t: Any) -> torch.Tensor:
        sigma = scheduler.sigmas[scheduler.step_index]
        return scheduler.precondition_outputs(x, prediction, sigma)

    check(made("EDMEulerScheduler", prediction_type=kind), own)


def test_later_steps_and_half_precision() -> None:
    clean = clean_image(made("DDIMScheduler"))
    assert clean.of_steps(3, 4).of_input == clean.of_input[3:7]
    z = torch.randn(2, 3).half()
    assert clean.x0(0, z, z).dtype is torch.float32
    assert clean.prediction(0, z, clean.x0(0, z, z)).dtype is torch.float32


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(SchedulerError, match="IPNDMScheduler has neither sigmas"):
        clean_image(made("IPNDMScheduler"))
    scheduler = made("DDIMScheduler")
    scheduler.register_to_config(prediction_type="score")
    with pytest.raises(SchedulerError, match="prediction_type='score'"):
        clean_image(scheduler)
