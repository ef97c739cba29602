"""Exact steps that end by what happens: when they do, and that the rest is as if it were known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from toys import toy, toy_call

from asyncdiff import AsyncDenoiser, AutoWarmup, PlanError
from asyncdiff.sampling.auto_warmup import Drift

SPLIT = [["enter", "down"], ["mix", "up", "leave"]]
SCHEDULER = DDIMScheduler(clip_sample=False)
SCHEDULER.set_timesteps(20)


def spread(**settings: Any) -> AsyncDenoiser:
    waves = settings.get("schedule") == "wavefront"
    ranks = 2 if waves else 1 + settings.get("stride", 1)
    return AsyncDenoiser(toy(), devices=["cpu"] * ranks, split=SPLIT, **settings)


def run(denoiser: AsyncDenoiser, kick: int | None = None) -> torch.Tensor:
    """A generation; ``kick``: a step before which the latents change a lot."""
    call = toy_call()
    latents = call["sample"]
    with denoiser.generation(SCHEDULER.timesteps, SCHEDULER):
        for k, t in enumerate(SCHEDULER.timesteps):
            if k == kick:
                latents = -3 * latents
            (noise,) = denoiser(latents, t, encoder_hidden_states=call["encoder_hidden_states"])
            latents = latents - 0.02 * noise
    return latents


def outputs(changes: list[float]) -> list[torch.Tensor]:
    """Vectors with these relative changes from one to the next."""
    out = [torch.ones(64, dtype=torch.float64)]
    for c in changes:
        out.append(out[-1] / (1 - c))
    return out


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ([0.5, 0.3, 0.2, 0.1], 4),  # falls from the beginning: as soon as two are known
        ([0.1, 0.2, 0.3, 0.2, 0.1], 6),  # 0.2 is the change to step 4: known for step 6
        ([0.1, 0.1, 0.1, 0.1, 0.1], None),  # no decline
        ([0.1, 0.2, 0.3, 0.4, 0.5], None),
    ],
)
def test_exact_steps_end_after_the_largest_change(changes: list[float], first: int | None) -> None:
    drift = Drift(AutoWarmup())
    found = None
    for k, output in enumerate(outputs(changes)):
        if found is None and drift.enough(k):
            found = k
        drift.saw(k, output)
    for k in range(len(changes) + 1, len(changes) + 3):
        if found is None and drift.enough(k):
            found = k
    assert found == first


def test_what_is_given_away_may_change_afterwards() -> None:
    drift = Drift(AutoWarmup())
    for k, output in enumerate(outputs([0.5, 0.1])):
        given = output.clone()
        drift.saw(k, given)
        given.zero_()
    assert drift.enough(4) and not drift.enough(3)


@pytest.mark.parametrize(
    "settings",
    [{}, {"stride": 2}, {"schedule": "wavefront"}, {"exact_tail": 2}],
    ids=["asyncdiff", "stride", "wavefront", "tail"],
)
def test_the_generation_is_that_of_the_number_found(settings: dict[str, Any]) -> None:
    auto = spread(warmup=AutoWarmup(most=15), **settings)
    got = run(auto, kick=3)
    found = auto.report().warmup
    # The kick's change, to step 3, is the largest; the next one is smaller, and known for step 6.
    assert found == 6
    fixed = spread(warmup=found, **settings)
    assert torch.equal(got, run(fixed, kick=3))
    told, want = auto.report(), fixed.report()
    assert (told.ticks, told.exchange_bytes) == (want.ticks, want.exchange_bytes)
    assert torch.equal(got, run(auto, kick=3))  # the same again
    auto.close()
    fixed.close()


@pytest.mark.parametrize("schedule", ["asyncdiff", "wavefront"])
def test_the_bound_holds(schedule: str) -> None:
    auto = spread(warmup="auto", schedule=schedule)  # a fifth of 20 steps, and no decline so early
    assert auto.plan(20).warmup == 4
    want = spread(warmup=4, schedule=schedule)
    assert torch.equal(run(auto, kick=3), run(want, kick=3))
    assert auto.report().warmup == 4
    few = spread(warmup=AutoWarmup(most=9), exact_tail=18, schedule=schedule)
    assert few.plan(20).warmup == 2
    for denoiser in (auto, want, few):
        denoiser.close()


def test_numbers_and_combinations_that_make_no_sense() -> None:
    for wrong in ({"most": 0}, {"most": 2.5}, {"decline": 0}, {"decline": 1.5}):
        with pytest.raises(PlanError):
            AutoWarmup(**wrong)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="'often'"):
        spread(warmup="often")
    with pytest.raises(PlanError, match="exact_mode='chain'"):
        spread(warmup="auto", exact_mode="split")
