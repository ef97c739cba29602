"""Ranks that share out the tokens of a denoiser on GPUs, in CUDA graphs: as by itself."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import sequence
import torch
from conftest import PLACES, devices_for
from families import FAMILIES

from asyncdiff import AsyncDenoiser

pytestmark = pytest.mark.usefixtures("full_float32")

STEPS = 4
#: By settings: how many ranks.
SETTINGS: list[tuple[int, dict[str, Any]]] = [
    (2, {"schedule": "sequence", "components": 2}),
    (4, {"schedule": "sequence", "components": 4}),
    (2, {"schedule": "sequence", "components": 2, "compile": "regions"}),
    (2, {"components": 2, "warmup": 3, "exact_mode": "sequence"}),
    (4, {"schedule": "sequence", "components": 2, "guidance": "split"}),
]


def _inputs(name: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    _, call, _ = sequence.of_family(name)
    module = FAMILIES[name]()[0].transformer.to("cuda:0", dtype)
    tensors = [
        t.to("cuda:0", dtype if t.is_floating_point() and t.dim() > 1 else t.dtype)
        for t in call.tensors
    ]
    return module, call.kwargs(tensors)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("ranks, settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["FLUX", "SD3"])
def test_as_by_itself(name: str, ranks: int, settings: dict[str, Any], place: str) -> None:
    if settings.get("guidance") == "split" and name == "FLUX":
        pytest.skip("its call has one condition")
    devices = [f"cuda:{d}" for d in devices_for(place, ranks)]
    module, given = _inputs(name, torch.float32)
    with torch.no_grad():
        want = module(**given)[0]
    time = given["timestep"].flatten()[:1].cpu()
    made = AsyncDenoiser(module, devices=devices, split="estimate", **settings)
    with contextlib.closing(made) as denoiser:
        for _ in range(3):
            with denoiser.generation(time.expand(STEPS)):
                results = [denoiser(**given)[0] for _ in range(STEPS)]
            for got in results:
                torch.testing.assert_close(
                    got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max())
                )
        assert denoiser.report().cuda_graphs


@pytest.mark.parametrize("place", PLACES)
def test_without_peer_access(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is staged in host memory is put together elsewhere than in the mailbox."""
    monkeypatch.setenv("ASYNCDIFF_TRANSPORT", "staged")
    test_as_by_itself("FLUX", *SETTINGS[0], place)


@pytest.mark.parametrize("place", PLACES)
def test_in_half_precision(place: str) -> None:
    """As far from the result in float32 as the plain one in half precision is, by rounding."""
    devices = [f"cuda:{d}" for d in devices_for(place, 2)]
    full, given = _inputs("FLUX", torch.float32)
    with torch.no_grad():
        want = full(**given)[0]
    module, given = _inputs("FLUX", torch.bfloat16)
    with torch.no_grad():
        far = (module(**given)[0] - want).norm()
    time = given["timestep"].flatten()[:1].cpu()
    made = AsyncDenoiser(module, devices=devices, schedule="sequence", components=2)
    with contextlib.closing(made) as denoiser, denoiser.generation(time.expand(STEPS)):
        for _ in range(STEPS):
            assert (denoiser(**given)[0] - want).norm() < 1.2 * far


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_without_text(ranks: int, place: str) -> None:
    """Some give nothing where others meet them, in a CUDA graph, too."""
    devices = [f"cuda:{d}" for d in devices_for(place, ranks)]
    module = sequence.streams().cuda()
    call = {name: x.cuda() for name, x in sequence.streams_call(4, 8).items()}
    with torch.no_grad():
        want = module(**call)[0]
    made = AsyncDenoiser(module, devices=devices, schedule="sequence", components=ranks)
    with contextlib.closing(made) as denoiser:
        for _ in range(2):
            with denoiser.generation([900] * STEPS):
                results = [denoiser(**call)[0] for _ in range(STEPS)]
            for got in results:
                most = 1e-4 * float(want.abs().max())
                torch.testing.assert_close(got, want, rtol=1e-4, atol=most)
        assert denoiser.report().cuda_graphs
