"""What the sampler is given while predictions are on their way; that its errors are paid back."""

from __future__ import annotations

import itertools

import diffusers
import pytest
import torch

from asyncdiff.sampling.clean_image import CleanImage, last_steps
from asyncdiff.sampling.predictor import Line, Predictor, Swings, default_order, feedback

STEPS = 40


def levels(name: str = "DDIMScheduler", steps: int = STEPS, **options: object) -> CleanImage:
    options = {"clip_sample": False} | options if name == "DDIMScheduler" else options
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(steps)
    return last_steps(scheduler, len(scheduler.timesteps))


def walk(
    truth: torch.Tensor, order: float, delay: int, warmup: int = 2, end: int = STEPS
) -> torch.Tensor:
    """By step, how far the latents are from where they should be, over α; of a DDIM sampler whose
    step k ought to be given the clean image ``truth[k]`` where latents are right, and the same
    noise where they are not. From ``end`` on steps are exact."""
    clean = levels()
    noise = [s / a for a, s in zip(clean.alpha, clean.sigma, strict=True)]
    predictor = Predictor(clean, Line(order), delay)
    y = right = torch.zeros(1, dtype=torch.float64)  # latents over α
    off, inputs, exact = [], {}, {}
    for k in range(STEPS - 1):
        z = inputs[k] = y * clean.alpha[k]
        exact[k] = (right - truth[k]) / noise[k]
        late = k - delay
        if k < warmup or k >= end:
            for j in range(max(warmup, late), k) if k == end else ():
                predictor.arrived(j, inputs[j], exact[j])
            predictor.arrived(k, z, exact[k])
            given = predictor.exact(k, z, exact[k])
        else:
            if late >= warmup:
                predictor.arrived(late, inputs[late], exact[late])
            given = predictor.predict(k, z, torch.float64)
        growth = noise[k + 1] - noise[k]
        y = y + growth * given
        right = right + growth * exact[k]
        off.append((y - right).abs())
    return torch.stack(off)


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_an_error_is_paid_back(delay: int) -> None:
    """A clean image that moves misleads the sampler until that is known, and not for good."""
    truth = ((torch.arange(STEPS).double() - 12) / 2).sigmoid()[:, None]
    for order in (0.0, 0.5):
        off = walk(truth, order, delay)
        assert off[:2].max() == 0
        assert off.max() > 0.002
        assert off[-1] < 0.1 * off.max()


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_exact_steps_at_the_end_pay_all_that_is_owed(delay: int) -> None:
    truth = (torch.arange(STEPS).double() / 9)[:, None].exp()  # nothing in it swings
    off = walk(truth, 0.5, delay, end=STEPS - 3)
    assert off[:2].max() == 0  # warm-up
    assert off[STEPS - 4] > 0.001
    assert off[STEPS - 3 :].max() < 1e-6  # the scheduler's levels are in float32


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_what_needs_no_correction_gets_none(delay: int) -> None:
    constant = torch.ones(STEPS, 1, dtype=torch.float64)
    line = torch.arange(STEPS).double()[:, None]
    assert walk(constant, 0.5, delay).max() < 1e-12
    # A line, where a whole slope follows it: from two known steps on.
    assert walk(line, 1.0, delay).max() < 1e-9


@pytest.mark.parametrize("delay", range(1, 12))
def test_errors_die_away_by_themselves(delay: int) -> None:
    """Owed n ticks on is owed before, less what the tick ``delay`` ago has paid back."""
    owed = [1.0] * (delay + 1)
    for _ in range(60 * delay):
        owed.append(owed[-1] - feedback(delay) * owed[-delay])
    assert max(map(abs, owed[-delay:])) < 1e-3


def test_what_swings_is_held() -> None:
    """Neither moved on nor paid back, sample by sample: that would amplify it."""
    watched, k = Swings(), torch.arange(30).double()
    path = torch.stack([0.2 * k, (1.5 * k).sin(), 0.9**k], 1)  # goes on, swings, settles
    for before, after in itertools.pairwise(path):
        watched.saw((after - before)[:, None], misled=True)
    assert isinstance(watched.trust, torch.Tensor)
    assert watched.trust.flatten().tolist() == [1.0, 0.0, 1.0]


def test_swings_of_exact_steps_do_not_count() -> None:
    """Nor the change from the last of them, which a prediction cannot have caused."""
    watched = Swings()
    for k in range(8):
        watched.saw(torch.full((1, 2), (-1.0) ** k), misled=k > 5)
    assert watched.trust == 1
    watched.saw(torch.ones(1, 2), misled=True)
    assert watched.trust == 0


@pytest.mark.parametrize("warmup", [1, 2, 5])
def test_all_is_on_the_device_of_the_predictions(warmup: int) -> None:
    """The meta device mixes with the CPU as little as a GPU does."""
    predictor, z = Predictor(levels(), Line(0.5), 1), torch.zeros(2, 4, 3, device="meta")
    for k in range(warmup):
        predictor.arrived(k, z, z)
    for k in range(warmup, 12):
        assert predictor.predict(k, z, torch.float16).device.type == "meta"
        predictor.arrived(k, z, z)
    predictor.arrived(12, z, z)
    assert predictor.exact(12, z, z).device.type == "meta"


def test_order_falls_with_delay_and_step_size() -> None:
    by_delay = [default_order(levels(steps=100), delay, 1) for delay in (1, 2, 3)]
    assert by_delay[0] == 0.75 and sorted(by_delay, reverse=True) == by_delay
    by_steps = [default_order(levels(steps=n), 1, 1) for n in (100, 12, 4)]
    assert sorted(by_steps, reverse=True) == by_steps and by_steps[-1] == 0
    assert default_order(levels(steps=100), 1, 2) == 0


@pytest.mark.parametrize(
    ("name", "options", "draws"),
    [
        ("EulerDiscreteScheduler", {}, False),
        ("EulerAncestralDiscreteScheduler", {}, True),
        ("DPMSolverMultistepScheduler", {}, False),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, True),
    ],
)
def test_where_noise_is_drawn_the_clean_image_is_held(
    name: str, options: dict[str, str], draws: bool
) -> None:
    clean = levels(name, 50, **options)
    assert (clean.response is None) == draws
    assert (default_order(clean, 1, 1) == 0) == draws


@pytest.mark.parametrize("exact", [False, True])
def test_a_short_step_is_not_given_all_that_long_ones_owe(exact: bool) -> None:
    """Steps given by hand may be of any length: what is added to x0 stays of the errors' size."""
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(timesteps=[900, 700, 500, 499, 300, 200])
    clean = last_steps(scheduler, len(scheduler.timesteps))
    predictor = Predictor(clean, Line(0), 1)
    z = torch.zeros(1, dtype=torch.float64)

    def of(step: int, x0: float) -> torch.Tensor:
        return clean.prediction(step, z, z + x0)

    predictor.arrived(0, z, of(0, 0.0))
    predictor.predict(1, z, z.dtype)
    predictor.arrived(1, z, of(1, 1.0))  # it was given 0
    if exact:
        predictor.arrived(2, z, of(2, 1.0))
        given = predictor.exact(2, z, of(2, 1.0))
    else:
        given = predictor.predict(2, z, z.dtype)
    assert 1 < clean.x0(2, z, given).item() <= 2
