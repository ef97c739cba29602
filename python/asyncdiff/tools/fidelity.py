"""How close a batch of pictures is to the pictures that it should be.

PSNR, SSIM and relative distance need nothing; LPIPS, FID and CLIP score need torchmetrics and
networks whose weights must lie on the disk: nothing is downloaded here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from ..errors import InputError, MetricError
from .compare import psnr, ssim

#: What a learned metric computes from pictures, those they should be, and their prompts.
Learned = Callable[[torch.Tensor, torch.Tensor, Sequence[str]], float]

_CLIP = "openai/clip-vit-base-patch16"


@dataclass(frozen=True)
class Fidelity:
    """Of a batch: PSNR in dB (mean over pictures, median, 10th percentile, lowest), mean SSIM,
    relative L2 distance of the whole batch, and learned metrics by name."""

    psnr_db: float
    psnr_db_median: float
    psnr_db_p10: float
    psnr_db_min: float
    ssim: float
    relative_l2: float
    learned: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def fidelity(
    images: torch.Tensor,
    reference: torch.Tensor,
    prompts: Sequence[str] = (),
    learned: dict[str, Learned] | None = None,
) -> Fidelity:
    """Compare ``images`` with ``reference``: floats in 0 … 1, (batch, channels, height, width).

    Equal pictures have an infinite PSNR. Raises InputError for batches of different shapes.
    """
    if images.shape != reference.shape or images.dim() != 4:
        raise InputError(f"batches of {tuple(images.shape)} and {tuple(reference.shape)} pictures")
    a, b = images.double().cpu(), reference.double().cpu()
    pairs = [
        (x.permute(1, 2, 0).numpy(), y.permute(1, 2, 0).numpy()) for x, y in zip(a, b, strict=True)
    ]
    decibels = [psnr(x, y) for x, y in pairs]
    return Fidelity(
        psnr_db=fmean(decibels),
        psnr_db_median=median(decibels),
        psnr_db_p10=sorted(decibels)[len(decibels) // 10],
        psnr_db_min=min(decibels),
        ssim=fmean(ssim(x, y) for x, y in pairs),
        relative_l2=float((a - b).norm() / b.norm()),
        learned={name: metric(a, b, prompts) for name, metric in (learned or {}).items()},
    )


def learned_metrics() -> tuple[dict[str, Learned], dict[str, str]]:
    """The learned metrics that this machine can compute, and for the others what is missing."""
    found: dict[str, Learned] = {}
    missing: dict[str, str] = {}
    for name, make in {"lpips": lpips, "fid": fid, "clip_score": clip_score}.items():
        try:
            found[name] = make()
        except MetricError as e:
            missing[name] = str(e)
    return found, missing


def lpips() -> Learned:
    """Mean LPIPS (AlexNet; Zhang et al. 2018); 0 for equal pictures. Raises MetricError."""
    _need("lpips", "torchmetrics", "torchvision", weights="alexnet-owt-7be5be79.pth")
    from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity

    def metric(images: torch.Tensor, reference: torch.Tensor, prompts: Sequence[str]) -> float:
        a, b = (_at_least(x.float(), 64) for x in (images, reference))
        return float(
            learned_perceptual_image_patch_similarity(a, b, net_type="alex", normalize=True)
        )

    return metric


def fid() -> Learned:
    """Fréchet inception distance (Heusel et al. 2017) between the two batches, which should be
    of thousands of pictures. Raises MetricError."""
    inception = "weights-inception-2015-12-05-6726825d.pth"
    _need("fid", "torchmetrics", "torch_fidelity", weights=inception)
    from torchmetrics.image.fid import FrechetInceptionDistance

    def metric(images: torch.Tensor, reference: torch.Tensor, prompts: Sequence[str]) -> float:
        distance = FrechetInceptionDistance(normalize=True)
        distance.update(reference.float(), real=True)
        distance.update(images.float(), real=False)
        return float(distance.compute())

    return metric


def clip_score() -> Learned:
    """Mean CLIP score (Hessel et al. 2021) of pictures and prompts, 0 … 100. Raises MetricError."""
    _need("clip_score", "torchmetrics", "transformers")
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(_CLIP, "config.json"), str):
        raise MetricError(f"clip_score needs {_CLIP} in the Hugging Face cache: download it once")
    from torchmetrics.functional.multimodal import clip_score as score

    def metric(images: torch.Tensor, reference: torch.Tensor, prompts: Sequence[str]) -> float:
        pictures = (images.clamp(0, 1) * 255).round().to(torch.uint8)
        return float(score(list(pictures), list(prompts), model_name_or_path=_CLIP))

    return metric


def _need(metric: str, *packages: str, weights: str | None = None) -> None:
    """``weights``: a file of torch.hub's cache, which torchmetrics would otherwise download."""
    absent = [p for p in packages if find_spec(p) is None]
    if absent:
        names = " ".join(p.replace("_", "-") for p in absent)
        raise MetricError(f"{metric} needs {' and '.join(absent)}: pip install {names}")
    if (
        weights is not None
        and not (path := Path(torch.hub.get_dir(), "checkpoints", weights)).is_file()
    ):
        raise MetricError(f"{metric} needs the weights {path}, which are not there: put them there")


def _at_least(images: torch.Tensor, side: int) -> torch.Tensor:
    """Pictures of at least ``side`` pixels, enlarged by a whole factor."""
    factor = math.ceil(side / min(images.shape[2:]))
    return images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
