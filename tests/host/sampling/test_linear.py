"""Every scheduler that diffusers has: its steps as matrices, or the reason why not."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import diffusers
import pytest
import torch

from asyncdiff import SchedulerError
from asyncdiff.sampling.linear import LinearSampler, linearize

#: Usual settings of Stable Diffusion, for schedulers whose defaults clip.
SD: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
}
#: Without it, some solvers divide by zero in the last step.
LAST = {"final_sigmas_type": "sigma_min"}
#: Linear with their defaults.
LINEAR = {
    "CogVideoXDDIMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerDiscreteScheduler",
    "FlowMapEulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "HeliosScheduler",
    "IPNDMScheduler",
    "LMSDiscreteScheduler",
    "MiniMaxH3Scheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
}
#: Refused with their defaults, and why.
REFUSED = {
    "AmusedScheduler": "does not step with",
    "CMStochasticIterativeScheduler": "stochastic",
    "CogVideoXDPMScheduler": "does not step with",
    "ConsistencyDecoderScheduler": "stochastic",
    "DDIMInverseScheduler": "not linear",
    "DDIMParallelScheduler": "not linear",
    "DDIMScheduler": "not linear",
    "DDPMParallelScheduler": "stochastic",
    "DDPMScheduler": "stochastic",
    "EulerAncestralDiscreteScheduler": "stochastic",
    "FlowMatchHeunDiscreteScheduler": "2 times a step",
    "FlowMatchLCMScheduler": "stochastic",
    "HeliosDMDScheduler": "does not step with",
    "HeunDiscreteScheduler": "2 times a step",
    "KDPM2AncestralDiscreteScheduler": "2 times a step",
    "KDPM2DiscreteScheduler": "2 times a step",
    "LCMScheduler": "stochastic",
    "LTXEulerAncestralRFScheduler": "stochastic",
    "RePaintScheduler": "does not step with",
    "SASolverScheduler": "stochastic",
    "SCMScheduler": "does not step with",
    "TCDScheduler": "stochastic",
    "UnCLIPScheduler": "stochastic",
    "VQDiffusionScheduler": "does not step with",
}
#: What those need that cannot be made without.
NEEDED: dict[str, dict[str, Any]] = {
    "AmusedScheduler": {"config": {"mask_token_id": 1}},
    "ConsistencyDecoderScheduler": {"steps": 2},
    "HeliosDMDScheduler": {"config": {"stages": 1}},
    "HeliosScheduler": {"stage_index": 1},
    "SCMScheduler": {"steps": 2},
    "VQDiffusionScheduler": {"config": {"num_vec_classes": 8}},
}
NAMES = sorted(
    n for n in dir(diffusers.schedulers) if n.endswith("Scheduler") and not n.startswith("Flax")
)


def make(name: str, steps: int = 12, config: dict[str, Any] | None = None, **when: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = getattr(diffusers.schedulers, name)(**config or {})
        scheduler.set_timesteps(steps, **when)
    return scheduler


def own_loop(scheduler: Any, sampler: LinearSampler, latents: torch.Tensor) -> float:
    """The relative distance, in float32, to the scheduler's own loop around a bounded denoiser."""
    g = torch.Generator().manual_seed(2)
    noises = torch.randn(len(sampler.timesteps), *latents.shape, generator=g)

    def predict(k: int, sample: torch.Tensor) -> torch.Tensor:
        return 0.9 * torch.tanh(sample) + 0.3 * noises[k]

    own = latents
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for k, t in enumerate(sampler.timesteps):
        noise = predict(k, scale(own, t))
        own = scheduler.step(noise, t, own, return_dict=False)[0]
    given = [latents]
    for k, scale in enumerate(sampler.scales.to(latents)):
        given.append(predict(k, scale * sampler.latents(given)))
    mine = sampler.latents(given)
    return float((mine - own).abs().max() / own.abs().max())


def check(scheduler: Any, **options: Any) -> LinearSampler:
    sampler = linearize(scheduler, **options)
    assert sampler.error < 2e-7
    start = float(getattr(scheduler, "init_noise_sigma", 1.0))
    latents = start * torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    assert own_loop(scheduler, sampler, latents) < 1e-5
    return sampler


@pytest.mark.parametrize("name", NAMES)
def test_every_scheduler_with_its_defaults(name: str) -> None:
    needed = NEEDED.get(name, {})
    try:
        scheduler = make(name, **needed)
    except Exception as e:  # torchsde is missing, or (for one of proteins) there are no defaults
        if getattr(diffusers, "__version__", "") >= "0.42":
            assert name not in LINEAR and name not in REFUSED
        pytest.skip(f"{name} cannot be made: {e}"[:100])
    if name in LINEAR:
        check(scheduler)
        check(make(name, **{"steps": 30, **needed}))
        return
    try:
        check(scheduler)  # one that this list does not know yet
    except SchedulerError as e:
        assert REFUSED.get(name, "") in str(e)
        assert name in str(e)
    else:
        assert name not in REFUSED


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDIMScheduler", SD),
        ("DDIMScheduler", SD | {"prediction_type": "v_prediction"}),
        ("DDIMScheduler", SD | {"prediction_type": "sample", "set_alpha_to_one": False}),
        ("DDIMScheduler", SD | {"timestep_spacing": "trailing", "steps_offset": 1}),
        (
            "DDIMScheduler",
            SD | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        ),
        ("DDIMInverseScheduler", SD),
        ("DDIMParallelScheduler", SD),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
        ("DPMSolverMultistepScheduler", {"solver_order": 1}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", **LAST}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "solver_type": "heun"}),
        (
            "DPMSolverMultistepScheduler",
            {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        ),
        ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
        ("DEISMultistepScheduler", {"solver_order": 3}),
        ("UniPCMultistepScheduler", {"solver_order": 3}),
        ("UniPCMultistepScheduler", {"solver_type": "bh1", **LAST}),
        ("UniPCMultistepScheduler", {"disable_corrector": list(range(12))}),
        ("PNDMScheduler", {"skip_prk_steps": True, **SD}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ],
)
def test_settings(name: str, config: dict[str, Any]) -> None:
    config = {k: v for k, v in config.items() if k != "clip_sample" or "DDIM" in name}
    check(make(name, config=config))


@pytest.mark.parametrize(
    ("name", "config", "options", "reason"),
    [
        ("DDIMScheduler", SD, {"eta": 0.5}, "stochastic"),
        ("DDIMScheduler", SD | {"thresholding": True}, {}, "not linear"),
        ("DDIMScheduler", {"clip_sample_range": 6.0}, {}, "not linear"),
        ("DDIMScheduler", SD, {"use_clipped_model_output": 1, "word": 2}, "does not step with"),
        ("DPMSolverMultistepScheduler", {"thresholding": True}, {}, "not linear"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}, "stochastic"),
        ("EulerDiscreteScheduler", {}, {"s_churn": 4.0}, "stochastic"),
        ("UniPCMultistepScheduler", {"solver_type": "bh1"}, {}, "infinite"),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {}, "stochastic"),
    ],
)
def test_refusals(name: str, config: dict[str, Any], options: Any, reason: str) -> None:
    with pytest.raises(SchedulerError, match=f"{name}.*{reason}"):
        linearize(make(name, config=config), options=options)


def test_eta_zero_and_a_thousand_steps() -> None:
    check(make("DDIMScheduler", config=SD), options={"eta": 0.0})
    sampler = linearize(make("DPMSolverMultistepScheduler", 300))
    assert sampler.error < 1e-7


def test_from_the_middle_of_a_schedule() -> None:
    """Image to image: fewer timesteps than the scheduler has."""
    scheduler = make("DPMSolverMultistepScheduler")
    scheduler.set_begin_index(5)
    sampler = linearize(scheduler, scheduler.timesteps[5:])
    assert len(sampler.timesteps) == 7
    assert own_loop(scheduler, sampler, torch.randn(1, 4, 6, 6)) < 1e-5


def test_without_timesteps() -> None:
    scheduler = diffusers.DDIMScheduler()
    scheduler.timesteps = None
    with pytest.raises(SchedulerError, match="set_timesteps"):
        linearize(scheduler)


def test_nothing_is_changed() -> None:
    scheduler = make("UniPCMultistepScheduler")
    before = copy.deepcopy(vars(scheduler))
    random = torch.get_rng_state()
    linearize(scheduler)
    with pytest.raises(SchedulerError):
        linearize(make("DDPMScheduler"))
    assert torch.equal(torch.get_rng_state(), random)
    assert {k: repr(v) for k, v in before.items()} == {
        k: repr(v) for k, v in vars(scheduler).items()
    }


def test_the_users_random_numbers_are_left_alone() -> None:
    """Also meanwhile: other threads may draw from them."""
    torch.manual_seed(1234)
    state, seen = torch.get_rng_state(), []

    class Watched(diffusers.DDPMScheduler):  # type: ignore[misc]
        def step(self, *args: Any, **kwargs: Any) -> Any:
            made = super().step(*args, **kwargs)
            seen.append(torch.equal(torch.get_rng_state(), state))
            return made

    scheduler = Watched()
    scheduler.set_timesteps(12)
    with pytest.raises(SchedulerError, match="stochastic"):
        linearize(scheduler)
    assert seen and all(seen)
