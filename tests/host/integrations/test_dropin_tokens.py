"""Pipelines of transformers whose devices share out a picture's tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES

import asyncdiff
from asyncdiff.integrations.diffusers.auto import exact_mode
from asyncdiff.integrations.diffusers.pipeline import plan_partition
from asyncdiff.quality import Task
from asyncdiff.schedule.plan import build
from asyncdiff.schedule.simulate import Timing, predict


def _drawn(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    drawn: torch.Tensor = pipe(**call, generator=generator, output_type="latent")[0]
    return drawn


#: Of Klein KV ranks have programs of which one uses later what the other does not.
FAMILIES_BY_TOKENS = [
    ("FLUX", 2),
    ("FLUX.2 Klein KV", 2),
    *(
        pytest.param(name, devices, marks=pytest.mark.slow)
        for name in ("FLUX.2", "SD3", "Qwen-Image", "Wan 2.1", "LTX", "CogVideoX", "Hunyuan Video")
        for devices in (2, 4)
    ),
]


@pytest.mark.parametrize("name, devices", FAMILIES_BY_TOKENS)
def test_a_quality_takes_it_for_transformers_and_the_picture_is_the_plain_one(
    name: str, devices: int
) -> None:
    pipe, call = FAMILIES[name]()
    call = {**call, "num_inference_steps": 2}
    call.pop("output_type", None)
    plain = _drawn(pipe, call)
    with asyncdiff.parallelize(pipe, devices=["cpu"] * devices, quality="exact") as handle:
        drawn = _drawn(pipe, call)
        if name.startswith("FLUX"):  # without conditions to split
            assert "schedule='sequence'" in handle.settings and "tokens" in handle.settings
            assert handle.report().devices == ["cpu"] * devices
        assert len(handle.report().devices) > 1
    torch.testing.assert_close(drawn, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))


def test_another_setting_is_picked_where_tokens_cannot_be_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("asyncdiff.integrations.diffusers.auto.is_transformer", lambda _: True)
    pipe, call = FAMILIES["SD 1.5"]()
    call.pop("output_type", None)
    call["guidance_scale"] = 1.0
    plain = _drawn(pipe, call)
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, quality="exact") as handle:
        assert torch.equal(_drawn(pipe, call), plain)
        assert "one device" in handle.settings


def test_how_exact_steps_run_is_picked() -> None:
    by_hand: dict[str, Any] = {"components": 2, "warmup": 2, "exact_mode": "auto"}
    pipe, call = FAMILIES["FLUX"]()
    call.pop("output_type", None)
    plain = _drawn(pipe, call | {"num_inference_steps": 2})
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, **by_hand) as handle:
        assert handle.settings == 'exact_mode="auto" picks at the first call'
        drawn = _drawn(pipe, call | {"num_inference_steps": 2})
        assert "exact_mode='sequence'" in handle.settings and handle.config.components == 2
        torch.testing.assert_close(drawn, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))
        handle.configure(exact_mode="chain")
        handle.configure(warmup=1)
        _drawn(pipe, call)
        assert (handle.config.exact_mode, handle.config.warmup) == ("chain", 1)
        handle.configure(exact_mode="auto")
        _drawn(pipe, call)
        assert handle.config.exact_mode == "sequence"
    pipe, call = FAMILIES["SD 1.5"]()  # no transformer: two conditions
    call.pop("output_type", None)
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, **by_hand) as handle:
        _drawn(pipe, call)
        assert "exact_mode='split'" in handle.settings
        _drawn(pipe, call | {"guidance_scale": 1.0})
        assert "exact_mode='chain'" in handle.settings
        with pytest.raises(asyncdiff.InputError, match="of an AsyncDenoiser write"):
            handle.denoiser.configure(exact_mode="auto")


TASK = Task(devices=4, steps=50, step=0.1, guided=True, pictures=1, whole=True, tokens=True)


@pytest.mark.parametrize(
    "picked, task, settings",
    [
        ("sequence", {}, {"components": 4}),
        ("split", {}, {"components": 2}),
        ("sequence", {}, {"components": 2, "guidance": "split"}),
        ("split", {"tokens": False}, {"components": 4}),
        ("sequence", {"guided": False}, {"components": 2}),
        ("chain", {"tokens": False, "whole": False}, {"components": 4}),
        ("chain", {}, {"components": 4, "warmup": "auto"}),
        ("chain", {}, {"components": 4, "schedule": "sequence"}),
    ],
)
def test_what_is_picked(picked: str, task: dict[str, Any], settings: dict[str, Any]) -> None:
    config = asyncdiff.ParallelConfig(**settings, exact_mode="auto")
    assert exact_mode(replace(TASK, **task), config).settings == {"exact_mode": picked}


def test_a_plan_of_shares() -> None:
    """What a rank computes of a step, not what a component would."""
    pipe, _ = FAMILIES["FLUX"]()
    parts = plan_partition(pipe, 2, tokens=True, height=64, width=64)
    report = parts.report()
    assert not report.boundaries and "measured" in report.source
    assert report.whole_ms is not None
    slowest = max(c.ms for c in report.components)
    assert report.whole_ms / 2 < slowest < report.whole_ms
    found = predict(build(2, steps=4, schedule="sequence"), Timing.from_report(report.to_dict()))
    assert found.total_ms == pytest.approx(4 * slowest)
    assert found.speedup == pytest.approx(report.whole_ms / slowest)
    unet, _ = FAMILIES["SD 1.5"]()
    with pytest.raises(asyncdiff.TokensError):
        plan_partition(unet, 2, tokens=True, height=64, width=64)


@pytest.mark.slow
def test_neither_tokens_nor_conditions_can_be_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mochi is prepared for each mask, as it is."""
    monkeypatch.setattr("asyncdiff.integrations.diffusers.auto.is_transformer", lambda _: True)
    pipe, call = FAMILIES["Mochi"]()
    plain = _drawn(pipe, call | {"num_inference_steps": 2})
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, quality="exact") as handle:
        drawn = _drawn(pipe, call | {"num_inference_steps": 2})
        assert "one device" in handle.settings
    torch.testing.assert_close(drawn, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))
