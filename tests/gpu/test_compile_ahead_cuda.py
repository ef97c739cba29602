"""Pieces compiled for GPUs by processes that take none of their memory."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from conftest import PLACES, devices_for
from torch._dynamo.utils import counters
from toys import tower, tower_call

from asyncdiff import AsyncDenoiser
from asyncdiff.graph.compiled import compile as compiling
from asyncdiff.graph.compiled.pool import Pool

HALVES = [
    ["enter", *(f"blocks.{k}" for k in range(3))],
    [f"blocks.{k}" for k in (3, 4, 5)] + ["leave"],
]
#: A context of a GPU takes at least some 300 MB.
PROCESSES, CONTEXT = 4, 300e6


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_other_processes_compile_for_gpus(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    devices, times = devices_for(place, 2), torch.arange(900, 600, -100)
    call = tower_call()
    text = call["encoder_hidden_states"].to("cuda")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setattr(compiling, "_known", compiling._Known())
    free: list[int] = []
    close = Pool.close

    def look(self: Pool) -> None:
        if self._processes:
            assert len(self._processes) == PROCESSES  # none has ended
            free.extend(torch.cuda.mem_get_info(d)[0] for d in sorted(set(devices)))
        close(self)

    monkeypatch.setattr(Pool, "close", look)

    def run(workers: int, folder: str, compile: bool) -> torch.Tensor:
        monkeypatch.setenv("ASYNCDIFF_COMPILE_WORKERS", str(workers))
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / folder))
        denoiser = AsyncDenoiser(tower().to("cuda"), devices=devices, split=HALVES, compile=compile)
        latents = call["hidden_states"].to("cuda")
        with denoiser.generation(times):
            for t in times.to("cuda"):
                latents = latents - 0.1 * denoiser(latents, t, encoder_hidden_states=text)
        assert denoiser.report().compiled == compile
        denoiser.close()
        return latents

    want = run(0, "none", False)
    before = [torch.cuda.mem_get_info(d)[0] for d in sorted(set(devices))]
    counters.clear()
    got = run(PROCESSES, "ahead", True)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    found = counters["inductor"]
    assert found["fxgraph_cache_hit"] >= 4 and not found["fxgraph_cache_miss"]
    assert not [r for r in caplog.records if r.name == "asyncdiff" and r.levelno > logging.INFO]
    for was, then in zip(before, free, strict=True):
        assert was - then < PROCESSES * CONTEXT / 2
