"""What samplers make of predictions: of every scheduler that diffusers has."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from mixture import distance, draw
from rotation import often
from test_linear import LINEAR, NAMES, NEEDED, REFUSED, SD, make

from asyncdiff import SchedulerError
from asyncdiff.sampling.clean_image import clean_image
from asyncdiff.sampling.response import Owed, respond


@pytest.mark.parametrize("name", NAMES)
def test_every_scheduler_responds_or_says_why_not(name: str) -> None:
    """What draws noise, clips, or takes more than predictions has no response."""
    try:
        scheduler = make(name, **NEEDED.get(name, {}))
    except Exception as e:  # see test_linear
        pytest.skip(f"{name} cannot be made: {e}"[:100])
    if name == "PNDMScheduler":  # with its Runge-Kutta steps
        with pytest.raises(SchedulerError, match="goes back to latents of much earlier steps"):
            respond(scheduler)
    elif name in LINEAR:
        response = respond(scheduler)
        assert len(response.weights) == len(scheduler.timesteps) + 1
        assert respond(scheduler) is response  # it is measured once
    elif name in REFUSED:
        for _ in range(2):
            with pytest.raises(SchedulerError, match=REFUSED[name]):
                respond(scheduler)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *(
            (name, {})
            for name in sorted(LINEAR - {"IPNDMScheduler", "PNDMScheduler"})
            if name not in NEEDED
        ),
        ("DDIMScheduler", {**SD, "prediction_type": "v_prediction"}),
        ("PNDMScheduler", {"skip_prk_steps": True}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}),
        ("DEISMultistepScheduler", {"solver_order": 3}),
    ],
)
@pytest.mark.parametrize("start", [0, 4])
def test_what_is_owed_is_by_how_much_latents_are_off(
    name: str, config: dict[str, Any], start: int
) -> None:
    """Of two runs of a scheduler's own loop with predictions that differ."""
    scheduler = make(name, 14, config)
    if start:
        scheduler = make(name, 14, config)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
    response = respond(scheduler, start)
    times = scheduler.timesteps[start:]
    generator = torch.Generator().manual_seed(0)
    given, errors = 0.1 * torch.randn(2, len(times), 1, 4, 4, 4, generator=generator).double()
    paths = []
    for predictions in (given, given + errors):
        x, twin, path = torch.zeros(1, 4, 4, 4).double(), copy.deepcopy(scheduler), []
        for t, prediction in zip(times, predictions, strict=True):
            if hasattr(twin, "scale_model_input"):
                twin.scale_model_input(x, t)
            x = twin.step(prediction, t, x, return_dict=False)[0].double()
            path.append(x)
        paths.append(torch.stack(path))
    off, owed = paths[1] - paths[0], Owed(response)
    assert owed.at(1) is None
    for k, error in enumerate(errors):
        owed.learn(k, error)
        got = owed.at(k + 1)
        assert got is not None
        # What is older than its memory is carried on, as all is: nearly so where steps are uneven.
        assert (got - off[k]).norm() <= 0.02 * off[: k + 1].norm()


def test_a_response_of_later_steps() -> None:
    scheduler = make("DPMSolverMultistepScheduler")
    response = respond(scheduler)
    rest = response.of_steps(5, 7)
    assert len(rest.weights) == 8 and len(rest.weights[0]) == 7
    assert rest.weights[3][1] == response.weights[8][6]


#: Samplers in their usual settings, by how they remember earlier steps.
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", SD),
    "pndm": ("PNDMScheduler", {**SD, "skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", SD),
    "lms": ("LMSDiscreteScheduler", SD),
    "lms karras": ("LMSDiscreteScheduler", {**SD, "use_karras_sigmas": True}),
    **{f"dpm++ {n}": ("DPMSolverMultistepScheduler", {**SD, "solver_order": n}) for n in (1, 2, 3)},
    **{
        f"dpm {n}": (
            "DPMSolverMultistepScheduler",
            {
                **SD,
                "solver_order": n,
                "algorithm_type": "dpmsolver",
                "final_sigmas_type": "sigma_min",
            },
        )
        for n in (2, 3)
    },
    "singlestep 3": ("DPMSolverSinglestepScheduler", {**SD, "solver_order": 3}),
    **{f"deis {n}": ("DEISMultistepScheduler", {**SD, "solver_order": n}) for n in (1, 2, 3)},
    **{f"unipc {n}": ("UniPCMultistepScheduler", {**SD, "solver_order": n}) for n in (1, 2, 3)},
    "flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "edm": ("EDMEulerScheduler", {}),
}


@pytest.mark.parametrize("name", often(SAMPLERS.keys() - {"lms karras"}, SAMPLERS))
@pytest.mark.parametrize(
    ("steps", "delay", "warmup", "tail"),
    [
        (25, 1, 3, 2),
        pytest.param(50, 1, 5, 1, marks=pytest.mark.slow),
        pytest.param(50, 3, 8, 2, marks=pytest.mark.slow),
    ],
)
def test_paying_back_is_never_worse(
    name: str, steps: int, delay: int, warmup: int, tail: int
) -> None:
    kind, config = SAMPLERS[name]
    config = {k: v for k, v in config.items() if k != "clip_sample" or "DDIM" in kind}
    scheduler = getattr(diffusers, kind)(**config)
    scheduler.set_timesteps(steps)
    want = draw(scheduler)
    numbers = {"delay": delay, "warmup": warmup, "tail": tail}
    paid, unpaid = (distance(draw(scheduler, **numbers, pay=pay), want) for pay in (True, False))
    assert paid < unpaid


@pytest.mark.parametrize("bounds", [{"clip_sample": True}, {"thresholding": True}])
def test_what_is_clipped_is_not_paid_back(bounds: dict[str, bool]) -> None:
    """What is beyond bounds is felt otherwise than what is within."""
    scheduler = diffusers.DDIMScheduler(**SD | bounds)
    scheduler.set_timesteps(25)
    numbers = {"delay": 1, "warmup": 3, "tail": 2}
    assert torch.equal(draw(scheduler, **numbers), draw(scheduler, **numbers, pay=False))


@pytest.mark.parametrize(
    ("name", "config", "right"),
    [
        ("DDIMScheduler", SD, True),
        ("EulerDiscreteScheduler", {}, True),
        ("DPMSolverMultistepScheduler", {}, True),
        ("UniPCMultistepScheduler", {}, True),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, True),
        ("PNDMScheduler", {"skip_prk_steps": True}, False),
        ("LMSDiscreteScheduler", {}, False),
    ],
)
def test_noise_levels_of_schedules_from_the_middle(
    name: str, config: dict[str, Any], right: bool
) -> None:
    scheduler = make(name, 30, config)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(12)
    response = respond(scheduler, 12)
    clean = clean_image(scheduler).of_steps(12, len(response.start) - 1)
    if right:
        clean.check_levels(response)
    else:
        with pytest.raises(SchedulerError, match=f"{name} has other noise levels"):
            clean.check_levels(response)


@pytest.mark.parametrize(
    "scheduler, remembered",
    [
        (diffusers.DDIMScheduler(clip_sample=False), 0),
        (diffusers.DPMSolverMultistepScheduler(), 0),
        (diffusers.DEISMultistepScheduler(), 0),
        (diffusers.UniPCMultistepScheduler(), 0),
        (diffusers.FlowMatchEulerDiscreteScheduler(), 0),
        (diffusers.PNDMScheduler(skip_prk_steps=True), 3),
        (diffusers.LMSDiscreteScheduler(), 3),
    ],
    ids=lambda x: type(x).__name__,
)
@pytest.mark.parametrize("steps", [20, 50])
def test_how_much_a_sampler_remembers(scheduler: Any, remembered: int, steps: int) -> None:
    scheduler.set_timesteps(steps)
    assert respond(scheduler).remembered == remembered
