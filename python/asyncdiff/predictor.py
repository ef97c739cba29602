"""What the sampler is given while the exact prediction of its step is still on its way.

A wave's noise prediction arrives some steps late (:mod:`asyncdiff.wavefront`). The clean image x0
that it means changes slowly from step to step, much more slowly than the noise prediction, so the
x0 of a step is extrapolated from those of earlier steps, and turned back into a prediction at the
step's own latents.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from .clean_image import CleanImage
from .errors import InputError, PlanError
from .wavefront import delay

#: The most that is extrapolated: so many times the distance of the two known steps.
REACH = 4.0
#: Steps in log-SNR, ln(α/σ): up to the first they are small, from the second on large.
SMALL_STEP, LARGE_STEP = 0.12, 0.23


def check_order(order: float | None, schedule: str) -> None:
    """Raise PlanError for an order that there is not."""
    if order is not None and schedule != "wavefront":
        raise PlanError("order belongs to schedule='wavefront': it extrapolates clean images")
    if order is not None and not 0 <= order <= 1:
        raise PlanError(
            f"order={order!r}: take 0 (the newest known clean image is held) to 1 (a straight "
            "line through the two newest), or None"
        )


def default_order(clean: CleanImage, components: int, stride: int) -> float:
    """The order that measured best for such steps (docs/wavefront.md has the figures).

    The later a prediction arrives and the larger the steps are, the less an extrapolation is worth:
    it amplifies what it is fed back. With a stride it never paid.
    """
    if stride > 1:
        return 0.0
    late = delay(components, stride)
    gaps = sorted(abs(b - a) for a, b in itertools.pairwise(clean.log_snr))
    middle = gaps[len(gaps) // 2] if gaps else 0.0
    fine = min(1.0, max(0.0, (LARGE_STEP - middle) / (LARGE_STEP - SMALL_STEP)))
    return 0.75 / late**1.2 * fine if late else 0.0


def weights(known: Sequence[int], step: int, order: float) -> list[tuple[int, float]]:
    """x0 of ``step`` as a weighted sum of known ones: (step, weight), at most two of them.

    ``known`` are steps in ascending order; those after ``step`` are passed over. A line through
    the two newest, in the step's index, with ``order`` times its slope.
    """
    before = [k for k in known if k <= step][-2:]
    newest = before[-1]
    if newest == step or len(before) < 2 or order == 0:
        return [(newest, 1.0)]
    reach = min((step - newest) / (newest - before[0]), REACH)
    return [(newest, 1 + order * reach), (before[0], -order * reach)]


class Predictor:
    """Predictions for the sampler's steps of one generation, from exact ones of earlier steps."""

    def __init__(self, clean: CleanImage, order: float) -> None:
        self._clean = clean
        self._order = order
        self._known: dict[int, torch.Tensor] = {}

    def arrived(self, step: int, z: torch.Tensor, prediction: torch.Tensor) -> None:
        """The exact prediction of a step, and the denoiser's input that it belongs to.

        Both have any shape; where the input has more channels (a picture to paint into), the
        latents are its first ones. Steps arrive in ascending order.
        """
        self._known[step] = self._clean.x0(step, latents_in(z, prediction.shape), prediction)
        while len(self._known) > 2:
            del self._known[min(self._known)]

    def predict(self, step: int, z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The prediction for ``step``, whose denoiser input is ``z``."""
        parts = weights(sorted(self._known), step, self._order)
        newest, weight = parts[0]
        x0 = self._known[newest] * weight if weight != 1 else self._known[newest]
        for other, weight in parts[1:]:
            x0 = x0 + self._known[other] * weight
        return self._clean.prediction(step, latents_in(z, x0.shape), x0).to(dtype)


def latents_in(z: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The part of a denoiser's input that has the prediction's shape: its first channels.

    Raises InputError where there is none.
    """
    if tuple(z.shape) == tuple(shape):
        return z
    where = [i for i, (a, b) in enumerate(zip(z.shape, shape, strict=False)) if a != b]
    if z.dim() != len(shape) or len(where) != 1 or z.shape[where[0]] < shape[where[0]]:
        raise InputError(
            f"the denoiser predicts {tuple(shape)} for an input of {tuple(z.shape)}: waves need "
            "one prediction for each latent. Take schedule='asyncdiff'"
        )
    return z.narrow(where[0], 0, shape[where[0]])
