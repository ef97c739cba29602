"""Generations that are left in the middle on GPUs, where results are the caller's before they are
computed."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from conftest import PLACES, devices_for

from asyncdiff import AsyncDenoiser

pytestmark = pytest.mark.usefixtures("full_float32")


@pytest.mark.parametrize("place", PLACES)
def test_what_was_returned_before_a_generation_was_left_is_whole(place: str) -> None:
    devices = [f"cuda:{d}" for d in devices_for(place, 2)]
    weight = torch.nn.Linear(2048, 2048, bias=False, device="cuda:0")
    torch.nn.init.orthogonal_(weight.weight)
    module = torch.nn.Sequential(*[weight] * 40)

    class Slow(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = module

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.layers(sample) + timestep,)

    slow, sample = Slow(), torch.randn(8192, 2048, device="cuda:0")
    times = torch.arange(3.0, device="cuda:0")
    with torch.no_grad():
        want = slow(sample, times[0])[0]
    settings: dict[str, Any] = {"components": 2, "warmup": 1, "split": "estimate"}
    with contextlib.closing(AsyncDenoiser(slow, devices=devices, **settings)) as denoiser:
        for _ in range(3):
            with denoiser.generation(times):
                got = denoiser(sample, times[0])[0]
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
