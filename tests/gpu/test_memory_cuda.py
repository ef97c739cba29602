"""What components take of GPUs: what was estimated, and no more of the denoiser than that."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PLACES, devices_for
from group_weights import flux_pipeline, saved_flux
from tiny_pipelines import draw

import asyncdiff

pytestmark = pytest.mark.alone

#: Workspaces of libraries, by GPU.
_BESIDES = 150 << 20


def parallel(folder: Path, devices: list[int], **settings: Any) -> tuple[Any, dict[str, Any], Any]:
    """A FLUX of 1.1 GB in bfloat16, read from a checkpoint by two components."""
    pipe, call = flux_pipeline(saved_flux(folder, 5, 1536, torch.bfloat16))
    torch.cuda.empty_cache()
    for device in set(devices):
        torch.cuda.reset_peak_memory_stats(device)
    given = {"components": 2, "warmup": 2, "compile": False, "checkpoint": folder} | settings
    handle = asyncdiff.parallelize(pipe, devices, **given)
    pipe.to(f"cuda:{devices[0]}")
    for name, value in call.items():
        if isinstance(value, torch.Tensor):
            call[name] = value.to(f"cuda:{devices[0]}", torch.bfloat16)
    return pipe, call, handle


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("split", ["auto", "estimate"])
def test_peaks_are_those_of_components(place: str, split: str, tmp_path: Path) -> None:
    """Within a tenth, and never the whole denoiser on one of two."""
    devices = devices_for(place, 2)
    gc.collect()  # what earlier tests left would leave during this one
    before = {d: torch.cuda.memory_allocated(d) for d in set(devices)}
    pipe, call, handle = parallel(tmp_path, devices, split=split)
    with handle:
        assert draw(pipe, call).isfinite().all()
        entries = handle.report().memory
        assert len(entries) == len(set(devices))
        whole = sum(use.weights for use in handle.partition.memory())
        for entry in entries:
            peak = entry["peak_bytes"] - before[int(entry["device"].split(":")[1])]
            assert peak >= entry["weights_bytes"]
            assert peak <= 1.1 * entry["estimated_bytes"] + _BESIDES, entry
            if len(entries) == 2:
                assert peak < 0.75 * whole + _BESIDES


def test_what_is_free_counts_on_several_gpus(tmp_path: Path) -> None:
    """A second GPU that is nearly full takes a small component."""
    devices = devices_for("several GPUs", 2)
    free, _ = torch.cuda.mem_get_info(devices[1])
    taken = torch.empty(int(free - 0.5e9), dtype=torch.uint8, device=f"cuda:{devices[1]}")
    pipe, call, handle = parallel(tmp_path, devices, split="estimate")
    with handle:
        assert draw(pipe, call).isfinite().all()
        first, second = handle.partition.memory()
        assert second.total < 0.5e9 < first.total
    del taken
