"""What another process has prepared and compiled for GPUs gives the bits of what is made anew."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PLACES, devices_for


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", PLACES)
def test_cached_and_fresh_bits_agree(place: str, compile: bool, tmp_path: Path) -> None:
    """Cold, warm, and cold again in another folder, each in a process of its own."""
    devices = devices_for(place, 2)

    def run(folder: str) -> dict[str, object]:
        own = {
            "ASYNCDIFF_CACHE": str(tmp_path / folder),
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / folder / "inductor"),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        if compile:  # else each process times some kernels anew, and may take others
            own["TORCHINDUCTOR_DETERMINISTIC"] = "1"
        done = subprocess.run(
            [sys.executable, __file__, json.dumps([devices, compile])],
            env=os.environ | own,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return dict(json.loads(done.stdout.splitlines()[-1]))

    cold, warm, other = run("a"), run("a"), run("b")
    assert cold["exported"] and other["exported"] and not warm["exported"]
    if compile:
        assert cold["missed"] and not warm["missed"] and warm["hit"]
    assert warm["cuts"] == cold["cuts"]
    assert cold["bits"] == warm["bits"]
    if other["cuts"] == cold["cuts"]:  # nodes are timed anew
        assert other["bits"] == cold["bits"]


def draw(devices: list[int], compile: bool) -> dict[str, object]:
    """The digests of two sizes' generations in float16, and what was made for them."""
    from tiny_pipelines import tiny_unet
    from torch._dynamo.utils import counters

    from asyncdiff import AsyncDenoiser
    from asyncdiff.graph.example_inputs import example_inputs
    from asyncdiff.phases import recording
    from asyncdiff.runtime.cutting import cutter

    exports = []
    export = cutter.capture
    cutter.capture = lambda *a: exports.append(1) or export(*a)  # type: ignore[func-returns-value]
    torch.backends.cudnn.deterministic = True
    unet = tiny_unet().to("cuda", torch.float16)
    denoiser = AsyncDenoiser(unet, devices=devices, components=2, warmup=2, compile=compile)
    # Before its weights leave for the ranks.
    calls = [example_inputs(unet, height=64, width=width) for width in (64, 32)]
    times, bits = torch.arange(900, 200, -100, device="cuda"), []
    with recording() as spent:
        for call in calls:
            sample, text = call["sample"], call["encoder_hidden_states"]
            with denoiser.generation(times):
                for t in times:
                    sample = sample - 0.1 * denoiser(sample, t, encoder_hidden_states=text)[0]
            assert sample.isfinite().all()
            bits.append(hashlib.sha1(sample.cpu().numpy().tobytes()).hexdigest())
    cuts = str(denoiser.partition.cuts)
    denoiser.close()
    found = counters["inductor"]
    return {
        "bits": bits,
        "cuts": cuts,
        "exported": len(exports),
        "hit": found["fxgraph_cache_hit"],
        "missed": found["fxgraph_cache_miss"],
        "phases": spent.in_order(),
    }


if __name__ == "__main__":
    print(json.dumps(draw(*json.loads(sys.argv[1]))))
