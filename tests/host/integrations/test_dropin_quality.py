"""Nobody has to choose: ``parallelize(pipe, quality=…)`` picks settings for each generation."""

from __future__ import annotations

import logging
from typing import Any

import diffusers
import pytest
import reference
import torch
from rotation import often
from tiny_pipelines import draw, tiny_sd

import asyncdiff
from asyncdiff import InputError


def sd(pictures: int = 1) -> Any:
    pipe, call = tiny_sd()
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    call = {
        k: torch.cat([v] * pictures) if isinstance(v, torch.Tensor) else v for k, v in call.items()
    }
    return pipe, call


def test_it_picks_for_each_generation_and_says_what(caplog: pytest.LogCaptureFixture) -> None:
    pipe, call = sd()
    plain = sd()[0]
    handle = asyncdiff.parallelize(pipe, ["cpu"] * 2, quality="balanced", split="estimate")
    assert handle.settings == "quality='balanced' picks at the first call"
    with caplog.at_level(logging.INFO, "asyncdiff"):
        draw(pipe, call, num_inference_steps=20)
        draw(pipe, call, num_inference_steps=20)
    said = [r.message for r in caplog.records if "picks" in r.message]
    assert len(said) == 1
    assert said[0].endswith(handle.settings)
    config = handle.config
    assert (config.components, config.schedule, config.exact_mode) == (2, "wavefront", "split")
    engines = handle.denoiser._engines

    # A few steps: all exact, on the same ranks.
    got = draw(pipe, call, num_inference_steps=4)
    assert handle.denoiser._engines is engines
    assert handle.config.warmup == 4
    assert reference.distance(got, draw(plain, call, num_inference_steps=4)) < 1e-5

    # Without guidance there are no conditions to share exact steps.
    draw(pipe, call, num_inference_steps=20, guidance_scale=1.0)
    assert handle.config.exact_mode == "chain"
    assert handle.denoiser._engines is engines

    # Two pictures are drawn in turn.
    two = sd(2)[1]
    got = draw(pipe, two, num_inference_steps=6)
    assert handle.config.schedule == "pipeline"
    assert reference.distance(got, draw(plain, two, num_inference_steps=6)) < 1e-5
    handle.restore()
    assert reference.distance(draw(pipe, call), draw(plain, call)) == 0


def test_pndm_has_more_exact_steps_at_the_end() -> None:
    """As its steps use earlier predictions more than the new one."""
    drawn = {}
    for tail in (1, 3):  # which is what is picked
        pipe, call = sd()
        pipe.scheduler = diffusers.PNDMScheduler(skip_prk_steps=True)
        call["num_inference_steps"] = 14
        plain = draw(pipe, call)
        handle = asyncdiff.parallelize(pipe, ["cpu"] * 2, split="estimate")
        if tail == 1:
            handle.configure(exact_tail=1)
        drawn[tail] = reference.distance(draw(pipe, call), plain)
        assert f"exact_tail={tail}" in handle.settings
        handle.restore()
    assert drawn[3] < 0.5 * drawn[1]


def test_exact_is_exact() -> None:
    pipe, call = sd()
    handle = asyncdiff.parallelize(pipe, ["cpu"] * 2, quality="exact", split="estimate")
    plain = sd()[0]
    for options in ({"num_inference_steps": 12}, {"num_inference_steps": 12, "guidance_scale": 1}):
        got = draw(pipe, call, **options)
        assert reference.distance(got, draw(plain, call, **options)) < 1e-5
    handle.restore()


def test_samplers_without_noise_levels_are_exact() -> None:
    pipe, call = sd()
    plain = sd()[0]
    for p in (pipe, plain):
        p.scheduler = diffusers.IPNDMScheduler()
    handle = asyncdiff.parallelize(pipe, ["cpu"] * 2, quality="balanced", split="estimate")
    got = draw(pipe, call, num_inference_steps=12)
    assert reference.distance(got, draw(plain, call, num_inference_steps=12)) < 1e-5
    handle.restore()


class Mixing(torch.nn.Module):
    """A processor of attention by which conditions know of each other."""

    def __call__(self, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return hidden_states + hidden_states.mean(0, keepdim=True)


def test_a_denoiser_whose_conditions_know_of_each_other_is_kept_whole() -> None:
    results = []
    for parallel in (False, True):
        pipe, call = sd()
        for module in pipe.unet.modules():
            if hasattr(module, "processor"):
                module.processor = Mixing()
        if parallel:
            handle = asyncdiff.parallelize(pipe, ["cpu"] * 2, quality="exact", split="estimate")
        results.append(draw(pipe, call, num_inference_steps=4))
    assert reference.distance(results[1], results[0]) < 1e-5
    assert handle.config.guidance == "batched"
    handle.restore()


def test_settings_given_by_hand_are_kept() -> None:
    pipe, call = sd()
    handle = asyncdiff.parallelize(pipe, ["cpu"] * 2, quality="balanced", split="estimate")
    draw(pipe, call, num_inference_steps=12)
    handle.configure(warmup=5)
    draw(pipe, call, num_inference_steps=12)
    assert handle.config.warmup == 5
    handle = asyncdiff.parallelize(pipe, ["cpu"] * 2, components=2, split="estimate")
    assert handle.settings == "given by hand"
    draw(pipe, call)
    assert (handle.config.schedule, handle.config.warmup) == ("asyncdiff", 1)
    handle.restore()
    with pytest.raises(asyncdiff.PlanError, match="chooses settings for each generation"):
        asyncdiff.parallelize(pipe, ["cpu"] * 2).calibrate(**call)
    asyncdiff.restore(pipe)
    with pytest.raises(InputError, match="quality='high' chooses what components, warmup would"):
        asyncdiff.parallelize(pipe, ["cpu"] * 2, quality="high", components=2, warmup=3)
    with pytest.raises(InputError, match="quality='best': write one of"):
        asyncdiff.parallelize(pipe, ["cpu"] * 2, quality="best")


@pytest.mark.parametrize(
    "given",
    [
        {"quality": None},
        {"components": 2},
        {"warmup": 1},
        {"schedule": "asyncdiff"},
        {"guidance": "batched"},
        {"config": asyncdiff.ParallelConfig(devices=["cpu"] * 2)},
        {"split": [["conv_in", "down_blocks", "mid_block"], ["up_blocks", "conv_out"]]},
    ],
)
def test_what_is_given_by_hand_means_what_it_says(given: dict[str, Any]) -> None:
    """No quality chooses the rest of it: that is at its defaults, as it always was."""
    devices = None if "config" in given else ["cpu"] * 2
    handle = asyncdiff.parallelize(sd()[0], devices, **given)
    assert handle.settings == "given by hand"
    assert (handle.config.components, handle.config.schedule) == (2, "asyncdiff")
    handle.restore()


@pytest.mark.parametrize(
    "given",
    often(
        [{}, {"compile": False, "deadline": 20.0}],
        [{}, {"split": "estimate"}, {"compile": False, "deadline": 20.0}, {"quality": "auto"}],
    ),
)
def test_balanced_is_the_default(given: dict[str, Any]) -> None:
    pipe, call = sd()
    handle = asyncdiff.parallelize(pipe, ["cpu"] * 2, **given)
    assert handle.settings == "quality='balanced' picks at the first call"
    draw(pipe, call, num_inference_steps=12)
    assert handle.config.schedule == "wavefront"
    assert "schedule='wavefront', warmup=" in handle.settings
    handle.restore()
    # Where nobody says which devices: all GPUs, else the CPU, which is the plain pipeline.
    if not torch.cuda.is_available():
        handle = asyncdiff.parallelize(pipe, **given)
        got = draw(pipe, call, num_inference_steps=12)
        assert handle.settings == "components=1: one device"
        assert reference.distance(got, draw(sd()[0], call, num_inference_steps=12)) < 1e-5
        handle.restore()


@pytest.mark.slow
def test_samplers_without_noise_levels_are_exact_after_waves() -> None:
    """The ranks of waves are no way to draw what waves cannot."""
    pipe, call = sd()
    plain = sd()[0]
    handle = asyncdiff.parallelize(pipe, ["cpu"] * 2, quality="balanced", split="estimate")
    draw(pipe, call, num_inference_steps=12)
    assert handle.config.schedule == "wavefront"
    for p in (pipe, plain):
        p.scheduler = diffusers.IPNDMScheduler()
    for steps in (12, 4):
        got = draw(pipe, call, num_inference_steps=steps)
        assert reference.distance(got, draw(plain, call, num_inference_steps=steps)) < 1e-5
    handle.restore()


def test_what_is_given_by_hand_for_waves_holds_for_these_only() -> None:
    pipe, call = sd()
    plain = sd()[0]
    handle = asyncdiff.parallelize(pipe, ["cpu"] * 2, quality="balanced", split="estimate")
    handle.configure(exact_tail=3, warmup=2, order=0.5, exact_mode="split")  # no waves yet
    with pytest.raises(asyncdiff.PlanError, match="order=7"):
        handle.configure(order=7)
    with pytest.raises(InputError, match="cannot change"):
        handle.configure(stride=2)
    draw(pipe, call, num_inference_steps=12)
    assert (handle.config.exact_tail, handle.config.warmup, handle.config.order) == (3, 2, 0.5)
    two = sd(2)[1]
    got = draw(pipe, two, num_inference_steps=6)
    assert handle.config.schedule == "pipeline"
    assert reference.distance(got, draw(plain, two, num_inference_steps=6)) < 1e-5
    for options in ({"num_inference_steps": 12}, {"num_inference_steps": 8}):
        got = draw(pipe, call, **options)
    assert reference.distance(got, draw(plain, call, **options)) < 1e-5
    handle.restore()


#: Samplers that draw noise in their steps.
STOCHASTIC: list[tuple[str, dict[str, Any]]] = [
    ("LCMScheduler", {}),
    ("TCDScheduler", {}),
    ("DDPMScheduler", {}),
    ("SASolverScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
]


@pytest.mark.parametrize(("name", "config"), often([STOCHASTIC[i] for i in (1, 4, 5)], STOCHASTIC))
def test_samplers_that_draw_noise_are_exact(name: str, config: dict[str, Any]) -> None:
    pipe, call = sd()
    plain = sd()[0]
    for p in (pipe, plain):
        p.scheduler = getattr(diffusers, name)(**config)
    handle = asyncdiff.parallelize(pipe, ["cpu"] * 2, quality="balanced", split="estimate")
    got = draw(pipe, call, num_inference_steps=12)
    assert reference.distance(got, draw(plain, call, num_inference_steps=12)) < 1e-5
    assert "stochastic" in handle.settings
    handle.restore()


@pytest.mark.slow
def test_noise_that_a_call_asks_for_is_exact_too() -> None:
    pipe, call = sd()
    plain = sd()[0]
    handle = asyncdiff.parallelize(pipe, ["cpu"] * 2, quality="balanced", split="estimate")
    for eta, exact in ((0.0, False), (0.5, True)):
        got = draw(pipe, call, num_inference_steps=12, eta=eta)
        want = draw(plain, call, num_inference_steps=12, eta=eta)
        assert ("stochastic" in handle.settings) == exact
        assert (reference.distance(got, want) < 1e-5) == exact
    handle.restore()


def test_what_is_given_by_hand_is_said_and_not_more(caplog: pytest.LogCaptureFixture) -> None:
    """Without guidance there is nothing to split, whatever was given: that is no failure."""
    pipe, call = sd()
    handle = asyncdiff.parallelize(pipe, ["cpu"] * 2, quality="balanced", split="estimate")
    handle.configure(exact_mode="split", warmup=5)
    with caplog.at_level(logging.INFO, "asyncdiff"):
        draw(pipe, call, num_inference_steps=12, guidance_scale=1.0)
    assert handle.config.exact_mode == "chain"
    assert not [r for r in caplog.records if r.levelno > logging.INFO]
    assert "the first 5 and the last 1 of 12 steps exact (exact_mode, warmup by hand)" in (
        handle.settings
    )
    handle.configure(exact_mode="chain")
    draw(pipe, call, num_inference_steps=12)
    assert handle.config.exact_mode == "chain"
    assert "exact_mode='chain'" in handle.settings
    assert "a condition on each" not in handle.settings
    handle.restore()


@pytest.mark.parametrize("bounds", [{"clip_sample": True}, {"thresholding": True}])
def test_samplers_that_clip_are_exact(bounds: dict[str, bool]) -> None:
    """What is compared are settings: with these even rounding is amplified to 1 %."""
    pipe, call = sd()
    pipe.scheduler = diffusers.DDIMScheduler(**{"clip_sample": False} | bounds)
    handle = asyncdiff.parallelize(pipe, ["cpu"] * 2, quality="high", split="estimate")
    draw(pipe, call, num_inference_steps=20)
    assert (handle.config.components, handle.config.guidance) == (1, "split")
    assert "does it clip or threshold?" in handle.settings
    handle.restore()
