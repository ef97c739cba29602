"""What a way of making pictures faster is to the fidelity benchmark.

A method changes a diffusers pipeline from outside while it runs, and tells what it computes. Its
speed-up is that which its critical path allows: the multiply-accumulates (MACs) that the plain
pipeline computes one after another, over those that the method does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Work:
    """MACs of a generation. ``per_device``: the most that one device computes; ``critical``: those
    that wait for each other, which is no less than that."""

    per_device: float
    critical: float


class Method:
    """A way to run a pipeline. ``name`` is its row in tables; ``devices`` how many it takes."""

    name: str
    devices: int

    @contextlib.contextmanager
    def applied(self, pipe: Any, steps: int) -> Iterator[int]:
        """Change ``pipe`` inside the ``with``; gives the steps to ask it for."""
        yield steps

    def run(self, pipe: Any, call: Mapping[str, Any], steps: int) -> torch.Tensor:
        """The pictures of ``pipe(**call)``: float32 (batch, channels, height, width) in 0 … 1."""
        with self.applied(pipe, steps) as asked, torch.no_grad():
            out = pipe(**call, num_inference_steps=asked, output_type="pt")
        images: torch.Tensor = out.images
        return images.float().cpu()

    def settings(self, pipe: Any, steps: int) -> dict[str, Any]:
        """What else the result depends on: a row of other settings is not this method's."""
        return {}

    def work(self, pipe: Any, call: Mapping[str, Any], steps: int) -> Work:
        """What the method computes in such a generation of ``steps`` steps."""
        raise NotImplementedError
