"""The node whose settings are chosen by a quality, in ComfyUI's own runs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

pytest.importorskip("comfy", reason="COMFYUI names no folder of ComfyUI")
from tiny_models import flux, sample, sd15

from asyncdiff.errors import InputError


@pytest.fixture
def by_quality(pack: Any) -> Any:
    """The node's function, on two devices unless said otherwise."""
    node = pack.NODE_CLASS_MAPPINGS["AsyncDiffByQuality"]()

    def run(model: Any, quality: str, devices: str = "cpu, cpu") -> Any:
        return node.spread(model, quality, devices=devices)[0]

    return run


@pytest.fixture
def picked(caplog: pytest.LogCaptureFixture) -> Any:
    """What was picked since this was asked for last."""
    caplog.set_level(logging.INFO, "asyncdiff")

    def said() -> str:
        found = [r.getMessage() for r in caplog.records if " picks " in r.getMessage()]
        caplog.clear()
        return " | ".join(found)

    return said


def near(drawn: torch.Tensor, plain: torch.Tensor) -> float:
    return float((drawn - plain).norm() / plain.norm())


def test_a_unet(model: Any, by_quality: Any, picked: Any) -> None:
    plain = sample(model, steps=12)
    assert near(sample(by_quality(model, "exact"), steps=12), plain) < 1e-5
    assert "guidance='split'" in picked()
    waves = by_quality(model, "balanced")
    assert 1e-7 < near(sample(waves, steps=12), plain) < 5e-2
    assert "schedule='wavefront'" in picked()
    # Few steps are exact, on the ranks that there are.
    assert near(sample(waves, steps=4), sample(model, steps=4)) < 1e-5
    assert "each of these 4 steps is exact" in picked()
    # Nor can waves pay back what a sampler makes that draws noise.
    ancestral = sample(model, "euler_ancestral", steps=12)
    assert near(sample(waves, "euler_ancestral", steps=12), ancestral) < 1e-5
    # One that evaluates twice in a step is exact, one evaluation after another.
    assert near(sample(waves, "heun", steps=12), sample(model, "heun", steps=12)) < 1e-5


def test_a_transformer_shares_out_tokens(by_quality: Any, picked: Any) -> None:
    model = flux()
    plain = sample(model, steps=12, cfg=1.0)
    assert near(sample(by_quality(model, "exact"), steps=12, cfg=1.0), plain) < 1e-5
    assert "schedule='sequence'" in picked()


def test_large_latents_are_exact_by_default(
    by_quality: Any, picked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = flux()
    plain = sample(model, steps=12, cfg=1.0)
    monkeypatch.setattr("asyncdiff.integrations.auto._LARGE", plain.numel())
    assert near(sample(by_quality(model, "balanced"), steps=12, cfg=1.0), plain) < 1e-5
    assert "hardly longer" in picked()


def test_tokens_that_cannot_be_followed(
    model: Any, by_quality: Any, picked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncdiff.integrations.auto.is_transformer", lambda _: True)
    plain = sample(model, steps=12, cfg=1.0)
    assert near(sample(by_quality(model, "exact"), steps=12, cfg=1.0), plain) < 1e-5
    said = picked()
    assert "schedule='sequence'" in said and "one device" in said


def test_it_changes_with_what_is_asked_for(model: Any, by_quality: Any, picked: Any) -> None:
    waves, exact = by_quality(model, "balanced"), by_quality(model, "exact")
    plain = sample(model, steps=12)
    first = sample(waves, steps=12)
    assert near(sample(exact, steps=12), plain) < 1e-5
    assert torch.equal(sample(waves, steps=12), first)
    # As many pictures as devices are drawn in turn.
    several = sample(model, steps=12, batch=2)
    picked()
    assert near(sample(waves, steps=12, batch=2), several) < 1e-5
    assert "schedule='pipeline'" in picked()
    assert torch.equal(sample(waves, steps=12), first)


def test_by_hand_and_by_quality(model: Any, by_quality: Any, spread: Any) -> None:
    """MODELs of both nodes share a model."""
    plain = sample(model, steps=4)
    for each in (by_quality(model, "exact"), spread(model), by_quality(model, "exact")):
        assert near(sample(each, steps=4), plain) < 1e-5


def test_conditions_of_other_lengths(model: Any, by_quality: Any) -> None:
    """Which come in two calls a step."""
    plain = sample(model, steps=12, tokens=14)
    assert near(sample(by_quality(model, "exact"), steps=12, tokens=14), plain) < 1e-5


def test_what_is_refused(by_quality: Any) -> None:
    with pytest.raises(InputError, match="quality best: write one of exact"):
        by_quality(sd15(), "best")
    with pytest.raises(Exception, match="nothing to spread over cpu"):
        by_quality(sd15(), "exact", devices="cpu")
