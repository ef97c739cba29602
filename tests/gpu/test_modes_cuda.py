"""Compiled components and split guidance on GPUs: the results of plain components, in graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import PLACES, devices_for
from toys import toy, toy_call

from asyncdiff import AsyncDenoiser, AutoWarmup

SPLIT = [["enter", "down"], ["mix", "up", "leave"]]
TIMES = torch.arange(900, 100, -100)


def run(denoiser: AsyncDenoiser, dtype: torch.dtype) -> torch.Tensor:
    call = toy_call()
    latents = call["sample"].to("cuda", dtype)
    text = call["encoder_hidden_states"].to("cuda", dtype)
    with denoiser.generation(TIMES):
        for k, t in enumerate(TIMES.to("cuda")):
            (noise,) = denoiser(latents, t, encoder_hidden_states=text)
            latents = latents - (0.1 + 0.01 * k) * noise
    return latents


def spread(dtype: torch.dtype, devices: list[int], **settings: Any) -> AsyncDenoiser:
    return AsyncDenoiser(toy().to("cuda", dtype), devices=devices, split=SPLIT, **settings)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-9), (torch.float16, 2e-2)])
def test_compiled_components_are_those_that_were(
    place: str, dtype: torch.dtype, close: float
) -> None:
    devices = devices_for(place, 2)
    plain = spread(dtype, devices, compile=False)
    want = run(plain, dtype)
    plain.close()
    compiled = spread(dtype, devices, compile=True, warmup=1)
    got = run(compiled, dtype)
    report = compiled.report()
    assert report.compiled and report.cuda_graphs and report.compile_s > 0
    assert report.exposed_ms is not None
    torch.testing.assert_close(got, want, rtol=close, atol=close)
    assert torch.equal(run(compiled, dtype), got)  # replayed from the beginning
    compiled.close()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "modes",
    [
        {"guidance": "split"},
        {"warmup_mode": "split", "warmup": 4},
        {"guidance": "split", "warmup_mode": "split", "warmup": 4},
    ],
    ids=["guidance", "warmup", "both"],
)
def test_split_guidance_equals_one_group(place: str, stride: int, modes: dict[str, Any]) -> None:
    ranks = (stride + 1) * (2 if "guidance" in modes else 1)
    devices = devices_for(place, ranks)
    plain = spread(
        torch.float64, devices[: stride + 1], stride=stride, warmup=modes.get("warmup", 1)
    )
    want = run(plain, torch.float64)
    plain.close()
    split = spread(torch.float64, devices, stride=stride, **modes)
    torch.testing.assert_close(run(split, torch.float64), want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(run(split, torch.float64), want, rtol=1e-9, atol=1e-9)
    assert split.report().cuda_graphs
    split.close()


@pytest.mark.parametrize("place", PLACES)
def test_exact_steps_by_what_happens(place: str) -> None:
    devices = devices_for(place, 2)
    # Any change after the first is a decline, so that the number found is the least there is.
    auto = spread(torch.float32, devices, warmup=AutoWarmup(most=7, decline=1.0))
    got = run(auto, torch.float32)
    found = auto.report().warmup
    assert 4 <= found <= 7 and auto.report().cuda_graphs
    fixed = spread(torch.float32, devices, warmup=found)
    assert torch.equal(got, run(fixed, torch.float32))
    assert torch.equal(got, run(auto, torch.float32))
    auto.close()
    fixed.close()
