"""Guidance in two calls a step on GPUs: near to the same conditions in one batch, in CUDA graphs,
the same bits on one GPU and on several."""

from __future__ import annotations

import contextlib
import time
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
    {"components": 2, "warmup": 3, "exact_mode": "split"},
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
    return AsyncDenoiser(module, **{"split": "estimate", "devices": devices} | settings)


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
    if settings["components"] == 2:  # cut alike, however fast the links are
        settings = settings | {"split": [["enter", "down"], ["mix", "up", "leave"]]}
    found = []
    for place in PLACES:
        with contextlib.closing(_denoiser(place, settings)) as denoiser:
            found += [by_branch(denoiser, call["sample"][:1], texts, False) for _ in range(2)]
    # Twice on one GPU, then twice on several.
    assert [float((found[0] - other).abs().max()) for other in found] == [0.0] * 4


_PRODUCTS = 200


class _Slow(torch.nn.Module):
    """Something that takes a GPU milliseconds, on a sample and a text."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(4096, device="cuda:0", dtype=torch.float16))

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor]:
        out = sample + text
        for _ in range(_PRODUCTS):
            out = out @ self.weight
        return (out + timestep.half(),)


@pytest.mark.alone
def test_the_second_branch_does_not_wait_for_the_first_one_of_a_new_prompt() -> None:
    devices = [f"cuda:{d}" for d in devices_for("several GPUs", 2)]
    sample = torch.randn(4096, 4096, device="cuda:0", dtype=torch.float16)
    times = torch.arange(1.0, 3.0, device="cuda:0")
    denoiser = AsyncDenoiser(
        _Slow(), devices=devices, components=1, guidance="split", warmup=1, compile=False
    )

    def seconds(text_between: bool) -> float:
        """Of a generation of a step, for texts that it has not seen."""
        texts = [torch.randn_like(sample) for _ in range(2)]
        expected = [sample + text + times[0].half() for text in texts]
        torch.cuda.synchronize()
        begun = time.perf_counter()
        with denoiser.generation(times[:1], branches=2):
            (first,) = denoiser(sample, times[0], texts[0])
            other = texts[1]
            if text_between:
                other = torch.zeros_like(sample)
                for _ in range(50):  # made while the first branch is under way, and long after
                    other = other @ other
                other = other + texts[1]
            (second,) = denoiser(sample, times[0], other)
        torch.cuda.synchronize()
        taken = time.perf_counter() - begun
        for got, wanted in zip((first, second), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0.01)
        return taken

    with contextlib.closing(denoiser):
        for _ in range(3):
            seconds(False)
        taken = [seconds(False) for _ in range(5)]
        for _ in range(3):
            seconds(True)
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        weight = torch.eye(4096, device="cuda:0", dtype=torch.float16)
        begun.record()
        for _ in range(_PRODUCTS):
            sample @ weight
        ended.record()
        ended.synchronize()
        alone = begun.elapsed_time(ended) / 1e3
    assert sorted(taken)[2] < 1.6 * alone, (taken, alone)
