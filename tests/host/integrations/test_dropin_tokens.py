"""Pipelines of transformers whose devices share out a picture's tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES

import asyncdiff


def _drawn(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    drawn: torch.Tensor = pipe(**call, generator=generator, output_type="latent")[0]
    return drawn


def test_a_quality_takes_it_for_transformers_and_the_picture_is_the_plain_one() -> None:
    pipe, call = FAMILIES["FLUX"]()
    call.pop("output_type", None)
    plain = _drawn(pipe, call)
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, quality="exact") as handle:
        drawn = _drawn(pipe, call)
        assert "schedule='sequence'" in handle.settings and "tokens" in handle.settings
        assert handle.report().devices == ["cpu", "cpu"]
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
