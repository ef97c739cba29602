"""Fit a :class:`~asyncdiff.sampling.calibration.Calibration` to a model, on waves that it runs.

Step after step, the coefficients of a step are fitted to what is known then, and the pictures go on
with them: so each step is fitted on what the earlier ones really lead to, not on what a sequential
run would have had ("forward training": Ross and Bagnell, "Efficient Reductions for Imitation
Learning", 2010). What is aimed at is the clean image that leads the sampler back to the sequential
latents.

What fits some pictures may ruin others, so half of the pictures are only judged by: they are drawn
to the end with these very coefficients, and by the default. Nothing is fitted again after that.
"""

from __future__ import annotations

import itertools
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Literal, Protocol

import torch

from ..errors import InputError
from .calibration import TERMS, Calibration, Shape, terms
from .clean_image import CleanImage
from .linear import LinearSampler
from .predictor import evaluate

log = logging.getLogger("asyncdiff")

#: Pictures that a calibration takes at least, half of them to judge by.
LEAST = 8
#: A calibration is taken if it is better by this, in dB: its mean gain less two standard errors.
MARGIN = 1.0
#: The share of each term's own size by which its coefficient is held back.
_RIDGE = 0.01
#: Terms smaller than this share of the clean image get little weight: they are rounding.
_FLOOR = 2e-3
#: Errors below this share of the latents' power (here -100 dB) are alike: they are rounding.
_EXACT = 1e-10
#: A gain where there are no pictures at all, only what is not finite: so many dB lost.
_WORST = 999.0

#: A generation: every step exact; by the waves' default; or by waves that somebody predicts for.
Mode = Literal["exact", "default", "late"]


class Run(Protocol):
    """A generation of all pictures at once."""

    def step(self, k: int, z: torch.Tensor) -> Mapping[int, torch.Tensor]:
        """Give step ``k`` its denoiser input (floating point). The predictions that have arrived
        since the step before, by the step that they are for: guidance applied, of that shape. Of a
        generation that is not "late", what the sampler is given in step ``k``."""


#: Begins a generation.
Begin = Callable[[Mode], Run]


def fit(
    begin: Begin,
    latents: torch.Tensor,
    sampler: LinearSampler,
    clean: CleanImage,
    shape: Shape,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """The calibration of these waves, from ``latents``: the first ones of at least eight pictures.

    Every other picture is fitted, the rest judges. Where these do not all come closer to the
    sequential latents than by the default, by a margin that their number supports, the calibration
    has no coefficients, and a warning says so. ``progress`` is told steps done, and of how many.
    Runs three generations in turn, the first of them exactly.
    """
    check_pictures(latents)
    x, steps, done = latents.float(), len(clean.alpha), itertools.count(1)

    def draw(mode: Mode, fitting: _Fitting | None = None) -> list[torch.Tensor]:
        """The latents before every step, and the last ones."""
        run, path, given = begin(mode), [x], [x]
        for k in range(steps):
            z = path[-1] * float(sampler.scales[k])
            arrived = {step: prediction.float() for step, prediction in run.step(k, z).items()}
            given.append(arrived[k] if fitting is None else fitting.given(k, z, given, arrived))
            path.append(sampler.latents(given))
            progress(next(done), 3 * steps)
        return path

    plain = draw("exact")
    default = draw("default")[-1]
    fitting = _Fitting(plain, slice(0, None, 2), sampler, clean)
    gains = _gains(*(p[1::2] for p in (plain[-1], default, draw("late", fitting)[-1])))
    taken = wins(gains)
    if not taken:
        log.warning(
            "the calibration is left out, and waves predict by their default: of %d pictures that "
            "it was not fitted on it brings %d closer to the plain result, by %.1f dB in the mean, "
            "%.1f at worst; it has to bring all of them closer, and be better by %.0f dB for sure",
            len(gains), sum(g > 0 for g in gains), statistics.fmean(gains), min(gains), MARGIN,
        )  # fmt: skip
    return Calibration(
        shape,
        alpha=clean.alpha,
        sigma=clean.sigma,
        newest=tuple(fitting.newest) if taken else (),
        coefficients=tuple(fitting.coefficients) if taken else (),
        gains=tuple(gains),
        sampler=clean.sampler,
    )


def check_pictures(pictures: Sized) -> None:
    """Raise InputError where there are too few for a fit: before anything is prepared."""
    if len(pictures) < LEAST:
        raise InputError(
            f"a calibration needs at least {LEAST} pictures, half of them to judge by, not "
            f"{len(pictures)}: sixteen are better"
        )


def wins(gains: Sequence[float]) -> bool:
    """Whether a calibration is taken that brings unseen pictures closer by ``gains``, in dB."""
    error = statistics.stdev(gains) / math.sqrt(len(gains))
    return min(gains) > 0 and statistics.fmean(gains) - 2 * error >= MARGIN


def _gains(plain: torch.Tensor, default: torch.Tensor, calibrated: torch.Tensor) -> list[float]:
    """By how much the calibrated latents are closer to the plain ones than the default's: dB, by
    picture, within what rounding leaves of them; where anything is not finite, as bad as can be."""
    rounding = _EXACT * plain.double().square().flatten(1).mean(1)
    errors = [
        (x - plain).double().square().flatten(1).mean(1) + rounding for x in (default, calibrated)
    ]
    gains = 10 * (errors[0] / errors[1]).log10()
    return [g if math.isfinite(g) else -_WORST for g in gains.tolist()]


class _Fitting:
    """Predicts for waves with coefficients that it fits on the way, to some of the pictures.

    ``plain``: the latents before every step of the sequential run, and the last ones.
    """

    def __init__(
        self, plain: list[torch.Tensor], fitted: slice, sampler: LinearSampler, clean: CleanImage
    ) -> None:
        self._plain, self._fitted = plain, fitted
        self._sampler, self._clean = sampler, clean
        self._inputs: dict[int, torch.Tensor] = {}
        self._known: dict[int, torch.Tensor] = {}
        self._noise: dict[int, torch.Tensor] = {}
        #: by step: the newest step that is known, and the coefficients
        self.newest: list[int] = []
        self.coefficients: list[tuple[float, ...]] = []

    def given(
        self,
        k: int,
        z: torch.Tensor,
        before: Sequence[torch.Tensor],
        arrived: Mapping[int, torch.Tensor],
    ) -> torch.Tensor:
        """The prediction that the sampler is given in step ``k``. ``before``: the first latents and
        what it was given in the steps before."""
        self._inputs[k] = z
        for step, prediction in sorted(arrived.items()):
            at = self._inputs.pop(step)
            self._known[step] = x0 = self._clean.x0(step, at, prediction)
            self._noise[step] = self._clean.noise(step, at, x0)
        newest = sorted(self._known, reverse=True)[:3]
        self.newest.append(newest[0])
        if k in arrived:
            self.coefficients.append((0.0,) * len(TERMS))
            return arrived[k]
        found = terms(newest, k, self._clean.alpha, self._clean.sigma)
        parts = {name: evaluate(e, self._known, self._noise, z) for name, e in found.items()}
        held = self._known[newest[0]]
        solved = self._solve(list(parts.values()), self._aim(k, z, before, held), held)
        by_name = dict(zip(parts, solved, strict=True))
        self.coefficients.append(tuple(by_name.get(name, 0.0) for name in TERMS))
        x0 = held + sum(by_name[name] * part for name, part in parts.items())
        return self._clean.prediction(k, z, x0)

    def _aim(
        self, k: int, z: torch.Tensor, before: Sequence[torch.Tensor], held: torch.Tensor
    ) -> torch.Tensor:
        """By how much x0 has to differ from the newest known one for step ``k`` to end where the
        sequential run's does: where it ends is linear in x0."""
        gain = float(self._sampler.weights[k + 1, k + 1]) / self._clean.of_output[k]
        if not gain:
            return torch.zeros_like(held)
        ends = self._sampler.latents([*before, self._clean.prediction(k, z, held)])
        return (self._plain[k + 1] - ends) / gain

    def _solve(
        self, parts: Sequence[torch.Tensor], aim: torch.Tensor, held: torch.Tensor
    ) -> list[float]:
        """Weights of ``parts`` whose sum comes closest to ``aim`` on the pictures that are fitted:
        least squares, each weight held back in proportion to its term's own size."""
        a = torch.stack([p[self._fitted].flatten().double() for p in parts], 1)
        gram = a.T @ a
        floor = len(a) * float((_FLOOR * held[self._fitted].double()).square().mean())
        gram += torch.diag(gram.diag() * _RIDGE + floor)
        right = a.T @ aim[self._fitted].flatten().double()
        solved: list[float] = torch.linalg.solve_ex(gram, right).result.tolist()
        return solved
