"""Guidance in two calls a step on GPUs: near to the same conditions in one batch, in CUDA graphs,
the same bits on one GPU and on several."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from branched import STEPS, by_batch, by_branch
from conftest import PLACES, devices_for
from toys import toy, toy_call

from asyncdiff import AsyncDenoiser

pytestmark = pytest.mark.usefixtures("full_float32")

SETTINGS: list[dict[str, Any]] = [
    {"components": 2, "warmup": 1},
    {"components": 2, "stride": 2, "warmup": 1},
    {"components": 2, "warmup": 3, "warmup_mode": "split"},
    {"components": 1, "warmup": 1, "guidance": "split"},
    {"components": 2, "warmup": 1, "guidance": "split"},
    {"components": 2, "warmup": 2, "schedule": "wavefront", "exact_tail": 1},
]


def _call() -> dict[str, torch.Tensor]:
    return {k: v.to("cuda:0", torch.float32) for k, v in toy_call(2).items() if v.dim() > 1}


def _denoiser(place: str, settings: dict[str, Any]) -> AsyncDenoiser:
    ranks = settings["components"] + settings.get("stride", 1) - 1
    ranks *= 2 if settings.get("guidance") == "split" else 1
    devices = [f"cuda:{d}" for d in devices_for(place, ranks)]
    module = toy().to("cuda:0", torch.float32)
    return AsyncDenoiser(module, split="estimate", devices=devices, **settings)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_as_in_one_batch(place: str, settings: dict[str, Any]) -> None:
    call = _call()
    texts = list(call["encoder_hidden_states"].chunk(2))
    with contextlib.closing(_denoiser(place, settings)) as denoiser:
        expected = by_batch(denoiser, call)
        for said in (False, True, False):
            got = by_branch(denoiser, call["sample"][:1], texts, said)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        report = denoiser.report()
        assert report.branches == 2 and report.steps == STEPS
        assert report.cuda_graphs


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_one_gpu_and_several_give_the_same_bits_for_prompts_of_two_lengths(
    settings: dict[str, Any],
) -> None:
    call = _call()
    text = call["encoder_hidden_states"]
    texts = [text[:1], text[1:].repeat(1, 2, 1)[:, :7]]
    found = []
    for place in PLACES:
        with contextlib.closing(_denoiser(place, settings)) as denoiser:
            found += [by_branch(denoiser, call["sample"][:1], texts, False) for _ in range(2)]
    # Twice on one GPU, then twice on several.
    assert [float((found[0] - other).abs().max()) for other in found] == [0.0] * 4
