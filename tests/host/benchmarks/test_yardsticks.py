"""The yardstick models as they are shipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rotation import often

from yardsticks.load import SAMPLERS, load

ROOT = Path(__file__).parents[3]


def test_all_weights_together_are_small() -> None:
    """Who clones the repository gets all of them."""
    folders = ("python", "benchmarks", "tests")
    files = [f for folder in folders for f in (ROOT / folder).rglob("*.safetensors")]
    assert len(files) >= 5
    assert sum(f.stat().st_size for f in files) <= 32 * 2**20


@pytest.mark.parametrize("kind", often(["transformer"], SAMPLERS))
def test_draws_what_is_asked_for(kind: str) -> None:
    """Not noise, and not one picture for all: classes and seeds make a difference."""
    pipe = load(kind)
    noise = [torch.Generator().manual_seed(s) for s in (0, 0, 1)]
    images = pipe(
        ["ship", "frog", "ship"], generator=noise, num_inference_steps=6, output_type="pt"
    ).images
    assert images.shape == (3, 3, 32, 32)
    for other in (1, 2):
        assert float((images[0] - images[other]).square().mean().sqrt()) > 0.05
    # Neighbouring pixels of a picture are alike.
    steps = (images[..., 1:] - images[..., :-1]).abs().mean()
    assert float(steps) < 0.5 * float(images.flatten(2).std(2).mean())
