"""What the sampler is given while the exact prediction of its step is still on its way.

A wave's noise prediction arrives some steps late (:mod:`asyncdiff.schedule.wavefront`). The clean
image x0 that it means changes slowly from step to step, much more slowly than the noise prediction,
so the x0 of a step is extrapolated from those of earlier steps, and turned back into a prediction
at the step's own latents.

When the exact x0 of a step has arrived, it is known by how much the sampler was misled there, and,
by what the sampler makes of its predictions (:mod:`asyncdiff.sampling.response`), by how much its
latents are off by now. That is what it is *owed*; a step is given an x0 that pays it back, so that
errors do not pile up. It is the corrector of a predictor-corrector method for differential
equations, in its mode without a second evaluation (PEC); UniPC (Zhao et al. 2023, arXiv 2302.04867)
corrects samplers themselves that way. A sampler that is not linear is not paid back.

Both amplify what comes back to them, and with a strong guidance and large steps x0 can begin to
swing from step to step. So both are done only as far as a sample's x0 does not turn back in the
steps that they were done in (:class:`Swings`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..errors import InputError, PlanError
from .clean_image import CleanImage
from .response import Owed

#: The most that is extrapolated: so many times the distance of the two known steps.
REACH = 4.0
#: Steps in log-SNR, ln(α/σ), by their median: up to the first a line is worth its order, from the
#: second on nothing.
SMALL_STEP, LARGE_STEP = 0.2, 0.45

#: Where so much of a change of x0 is taken back by the next one, nothing is moved on or paid back.
#: Chosen on the yardsticks, of which none swings so in waves, and on the shipped model, which does
#: with a strong guidance.
SWING = 0.2
#: What is left of a swing, a step later.
_FADE = 0.9


def check_order(order: float | Rule | None, schedule: str) -> None:
    """Raise PlanError for an order that there is not."""
    if order is not None and schedule != "wavefront":
        raise PlanError("order belongs to schedule='wavefront': it extrapolates clean images")
    if order is None or hasattr(order, "estimate"):
        return
    if not isinstance(order, (int, float)) or not 0 <= order <= 1:
        raise PlanError(
            f"order={order!r}: take 0 (the newest known clean image is held) to 1 (a straight "
            "line through the two newest), a Calibration, or None"
        )


def default_order(clean: CleanImage, delay: int, stride: int) -> float:
    """The order that measured best for such steps, when predictions arrive ``delay`` ticks late.

    The later a prediction arrives and the larger the steps are, the less an extrapolation is worth:
    it amplifies what comes back to it. With a stride, steps are large, and x0 is held; so it is
    where a scheduler's steps are not linear: by noise that it draws, most of all.
    """
    if stride > 1 or delay == 0 or clean.response is None:
        return 0.0
    gaps = sorted(abs(b - a) for a, b in itertools.pairwise(clean.log_snr))
    middle = gaps[len(gaps) // 2] if gaps else 0.0
    fine = min(1.0, max(0.0, (LARGE_STEP - middle) / (LARGE_STEP - SMALL_STEP)))
    return 0.75 / math.sqrt(delay) * fine


def feedback(delay: int) -> float:
    """The share of what the sampler is owed that a tick pays back, when predictions arrive
    ``delay`` ticks late.

    Ticks under way do not know of each other, so the same error is paid back in several of them.
    Where an error stays in the latents as it is, it dies away with any share below
    2 sin(π / (4 · delay − 2)).
    """
    return 1 / (delay + 1)


@dataclass(frozen=True)
class Estimate:
    """A step's x0 as a weighted sum: of the x0 and ε of earlier steps, by step, and of the step's
    own denoiser input."""

    clean: Mapping[int, float]
    noise: Mapping[int, float] = field(default_factory=dict)
    of_input: float = 0.0


class Rule(Hashable, Protocol):
    """How x0 is estimated where it is not known yet."""

    @property
    def depth(self) -> int:
        """How many of the newest known steps it looks at."""

    @property
    def noise(self) -> bool:
        """Whether it looks at their ε and at the step's input, too."""

    def estimate(self, known: Sequence[int], step: int) -> Estimate:
        """Of ``step``, from ``known`` ones in ascending order; those after it are passed over."""


@dataclass(frozen=True)
class Line:
    """A line through the two newest known x0, in the step's index, with ``order`` times its slope;
    0 holds the newest."""

    order: float

    depth = 2
    noise = False

    def estimate(self, known: Sequence[int], step: int) -> Estimate:
        """See :class:`Rule`."""
        before = [k for k in known if k <= step][-2:]
        newest = before[-1]
        if newest == step or len(before) < 2 or self.order == 0:
            return Estimate({newest: 1.0})
        reach = min((step - newest) / (newest - before[0]), REACH)
        return Estimate({newest: 1 + self.order * reach, before[0]: -self.order * reach})


class Swings:
    """Watches whether x0 swings. ``trust``: from 1, where it does not, to 0, for each sample, of a
    shape that broadcasts with x0; a number as long as there is nothing to tell by.

    A change that takes some of the one before back is a swing, as large as the share of it. Only
    changes between steps that were given predictions count: what x0 does in exact steps is its own.
    """

    def __init__(self) -> None:
        self.trust: torch.Tensor | float = 1.0
        self._last: torch.Tensor | None = None
        self._swing: torch.Tensor | None = None
        self._misled = 0

    def saw(self, change: torch.Tensor, misled: bool) -> None:
        """x0 has changed so, from one known step to the next, which was given a prediction
        (``misled``) or not."""
        self._misled = self._misled + 1 if misled else 0
        if self._last is not None and self._misled > 2:
            before = _by_sample(self._last * self._last).clamp(min=torch.finfo(change.dtype).tiny)
            swing = (-_by_sample(change * self._last) / before).clamp(0, 1)
            if self._swing is not None:
                swing = torch.maximum(swing, _FADE * self._swing)
            self._swing = swing
            self.trust = (1 - swing / SWING).clamp(min=0)
        self._last = change


def _by_sample(x: torch.Tensor) -> torch.Tensor:
    """The sum over all but the first dimension, which are kept."""
    return x.flatten(1).sum(1).view(-1, *[1] * (x.dim() - 1)) if x.dim() > 1 else x


class LatePredictor(Protocol):
    """Takes predictions that arrive late, and says what a step is given meanwhile."""

    def arrived(self, step: int, z: torch.Tensor, prediction: torch.Tensor) -> None:
        """The prediction of a step, and the denoiser's input that it belongs to."""

    def predict(self, step: int, z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The prediction for ``step``, whose denoiser input is ``z``."""

    def exact(self, step: int, z: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        """What the sampler is given in a step whose own prediction has arrived."""


class Predictor:
    """Predictions for the sampler's steps of one generation, from exact ones of earlier steps.

    What the sampler is owed is paid back in the ``stride`` steps of a tick (:func:`feedback`, by
    ``delay``), and all of it in exact steps at the end. A rule that looks at the step's input sees
    there itself what errors have done: then nothing is added.
    """

    def __init__(self, clean: CleanImage, rule: Rule, delay: int, stride: int = 1) -> None:
        self._clean = clean
        self._rule = rule
        self._stride = stride
        self._share = feedback(delay)
        self._late = delay * stride
        self._known: dict[int, torch.Tensor] = {}
        self._noise: dict[int, torch.Tensor] = {}
        #: x0 of steps that are not known yet, and what of it was added to pay back
        self._given: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._owed = Owed(clean.response) if clean.response is not None else None
        self._swings = Swings()

    def arrived(self, step: int, z: torch.Tensor, prediction: torch.Tensor) -> None:
        """The exact prediction of a step, and the denoiser's input that it belongs to.

        Both have any shape; where the input has more channels (a picture to paint into), the
        latents are its first ones. Steps arrive in ascending order.
        """
        z = latents_in(z, prediction.shape)
        x0 = self._clean.x0(step, z, prediction)
        if self._known and not self._rule.noise:
            self._swings.saw(x0 - self._known[max(self._known)], step in self._given)
        self._known[step] = x0
        if self._rule.noise:
            self._noise[step] = self._clean.noise(step, z, x0)
        self._settle()
        while len(self._known) > self._rule.depth:
            oldest = min(self._known)
            del self._known[oldest]
            self._noise.pop(oldest, None)

    def predict(self, step: int, z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The prediction for ``step``, whose denoiser input is ``z``."""
        self._settle()
        estimate = self._rule.estimate(sorted(self._known), step)
        z = latents_in(z, next(iter(self._known.values())).shape)
        x0 = evaluate(estimate, self._known, self._noise, z)
        if not self._rule.noise:
            trust = self._swings.trust
            held = self._known[max(k for k in self._known if k <= step)]
            x0 = held + (x0 - held) * trust
            payment = self._payment(step, self._stride)
            if payment is not None:
                payment = payment * (trust * self._share)
                x0 = x0 + payment
            self._given[step] = x0, payment
        return self._clean.prediction(step, z, x0).to(dtype)

    def exact(self, step: int, z: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        """What the sampler is given in a step whose own prediction has arrived: that, and all that
        it is owed."""
        payment = self._payment(step, 1)
        if payment is None:
            return prediction
        x0 = self._known[step] + payment
        self._given[step] = x0, payment
        z = latents_in(z, prediction.shape)
        return self._clean.prediction(step, z, x0).to(prediction.dtype)

    def _settle(self) -> None:
        """Note what the steps up to the newest known one were given too little. Steps that have no
        wave of their own (a stride) lie between the two that have. Of others, whose wave was not
        finished, it is known what they paid back."""
        newest = max(self._known)
        for k in [k for k in self._given if k <= newest]:
            given, paid = self._given.pop(k)
            if self._owed is None:
                continue
            before = max(j for j in self._known if j <= k)
            after = min(j for j in self._known if j >= k)
            error = None if paid is None else -paid
            if after - before <= self._stride:
                x0 = self._known[before]
                if before < after:
                    x0 = torch.lerp(x0, self._known[after], (k - before) / (after - before))
                error = x0 - given
            if error is not None:
                self._owed.learn(k, error / self._clean.of_output[k])

    def _payment(self, step: int, steps: int) -> torch.Tensor | None:
        """What to add to x0 in so many steps, so that after them nothing is owed.

        Where x0 moves these latents less than in the steps whose errors have just become known, it
        is as if it did not: a step much shorter than these would be given an x0 far from any image.
        """
        if self._owed is None:
            return None
        end = min(step + steps, len(self._clean.alpha))
        owed = self._owed.at(end)
        gain = self._gain(step, end)
        if owed is None or not gain:
            return None
        first = max(0, step - self._late)
        most = max(abs(self._gain(k, k + end - step)) for k in range(first, step + 1))
        return owed / math.copysign(most, gain)

    def _gain(self, step: int, end: int) -> float:
        """By how much x0 in the steps from ``step`` on moves the latents before step ``end``."""
        assert self._clean.response is not None
        row = self._clean.response.weights[end]
        return sum(row[k] / self._clean.of_output[k] for k in range(step, end))


def evaluate(
    estimate: Estimate,
    clean: Mapping[int, torch.Tensor],
    noise: Mapping[int, torch.Tensor],
    z: torch.Tensor,
) -> torch.Tensor:
    """The weighted sum, in the dtype of ``clean``."""
    terms = [(w, clean[k]) for k, w in estimate.clean.items()]
    terms += [(w, noise[k]) for k, w in estimate.noise.items()]
    weight, first = terms[0]
    x0 = first * weight if weight != 1 else first
    for weight, term in terms[1:]:
        x0 = x0 + term * weight
    return x0 + z.to(x0.dtype) * estimate.of_input if estimate.of_input else x0


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
