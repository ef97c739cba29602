"""Fit a :class:`~asyncdiff.sampling.calibration.Calibration` to a model, on waves that it runs.

Step after step, the coefficients of a step are fitted to what is known then, and the pictures go on
with them: so each step is fitted on what the earlier ones really lead to, not on what a sequential
run would have had ("forward training": Ross and Bagnell, "Efficient Reductions for Imitation
Learning", 2010). Two things to aim at are tried: the clean image that leads the sampler back to the
sequential latents, and the clean image of the same step of the sequential run. Half of the pictures
are fitted, the other half says which is better, or whether the line is; then all are fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import InputError
from .calibration import TERMS, Calibration, Shape, terms
from .clean_image import CleanImage
from .linear import LinearSampler
from .predictor import Line, evaluate

#: What a fit aims at, and the share of each term's own size by which coefficients are held back.
AIMS = {"sequential latents": 0.01, "sequential clean image": 0.3}
#: Terms smaller than this share of the clean image get little weight: they are rounding.
_FLOOR = 2e-3
#: Generations that a fit takes: the sequential one, the line, each aim, and the last fit.
_GENERATIONS = 3 + len(AIMS)


class Run(Protocol):
    """A generation of all pictures at once."""

    def step(self, k: int, z: torch.Tensor) -> Mapping[int, torch.Tensor]:
        """Give step ``k`` its denoiser input (floating point). The predictions that have arrived
        since the step before, by the step that they are for: guidance applied, of that shape."""


#: Begins a generation: with every step exact, or the waves that are calibrated.
Begin = Callable[[bool], Run]


@dataclass
class _Fit:
    """What a simulation fits: to what, and on which pictures."""

    aim: str
    pictures: Sequence[int]
    coefficients: dict[int, tuple[float, ...]]


def fit(
    begin: Begin,
    latents: torch.Tensor,
    sampler: LinearSampler,
    clean: CleanImage,
    shape: Shape,
    order: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """The calibration of these waves, from ``latents``: the first ones of at least two pictures.

    ``order``: of the line that is tried beside. ``progress`` is told steps done, and of how many.
    Runs five generations in turn, the first of them exactly.
    """
    check_pictures(latents)
    pictures = len(latents)
    trials = _Trials(begin, latents.float(), sampler, clean, progress)
    truth = trials.draw(None)
    fitted, judging = range(0, pictures, 2), list(range(1, pictures, 2))

    def distance(last: torch.Tensor) -> float:
        a, b = last[judging].double(), truth[judging].double()
        return float((a - b).norm() / b.norm())

    line = Line(order)
    tried = {f"line of order {order:.2g}": distance(trials.draw(line))}
    for aim in AIMS:
        tried[aim] = distance(trials.draw(_Fit(aim, fitted, {})))
    best = min(tried, key=lambda k: tried[k])
    if best in AIMS:
        final = _Fit(best, range(pictures), {})
        trials.draw(final)
        found = final.coefficients
    else:  # the coefficients that make the line
        slopes = {
            k: line.estimate(known, k).clean[known[-1]] - 1 for k, known in trials.late.items()
        }
        found = {
            k: tuple(v if name == "slope" else 0.0 for name in TERMS) for k, v in slopes.items()
        }
    progress(1, 1)
    steps = range(len(clean.alpha))
    return Calibration(
        shape,
        alpha=clean.alpha,
        sigma=clean.sigma,
        newest=tuple(trials.late[k][-1] if k in trials.late else k for k in steps),
        coefficients=tuple(found.get(k, (0.0,) * len(TERMS)) for k in steps),
        tried=tried,
        sampler=clean.sampler,
    )


def check_pictures(pictures: Sized) -> None:
    """Raise InputError where there are too few for a fit: before anything is prepared."""
    if len(pictures) < 2:
        raise InputError(
            "a calibration needs at least two pictures, half of them to judge by: eight or more "
            "are better"
        )


class _Trials:
    """Generations of all pictures at once; the first one has to be the sequential one."""

    def __init__(
        self,
        begin: Begin,
        latents: torch.Tensor,
        sampler: LinearSampler,
        clean: CleanImage,
        progress: Callable[[int, int], None],
    ) -> None:
        self._begin, self._latents = begin, latents
        self._sampler, self._clean = sampler, clean
        self._progress, self._done = progress, 0
        #: of the sequential run: the latents before every step and the last ones; clean images
        self._truth: list[torch.Tensor] = []
        self._truth_x0: dict[int, torch.Tensor] = {}
        #: of the last waves, by step without a prediction of its own: the known steps, ascending
        self.late: dict[int, list[int]] = {}

    def draw(self, rule: Line | _Fit | None) -> torch.Tensor:
        """The last latents, when clean images are predicted so; sequentially without a rule."""
        run, steps = self._begin(rule is None), len(self._clean.alpha)
        x, given = self._latents, [self._latents]
        path = [x]
        inputs: dict[int, torch.Tensor] = {}
        known: dict[int, torch.Tensor] = {}
        noise: dict[int, torch.Tensor] = {}
        self.late = {}
        for k in range(steps):
            z = inputs[k] = x * float(self._sampler.scales[k])
            arrived = {step: prediction.float() for step, prediction in run.step(k, z).items()}
            for step, prediction in sorted(arrived.items()):
                x0 = self._clean.x0(step, inputs[step], prediction)
                known[step], noise[step] = x0, self._clean.noise(step, inputs.pop(step), x0)
            if k in arrived:
                given.append(arrived[k])
            else:
                self.late[k] = sorted(known)
                if isinstance(rule, Line):
                    x0 = evaluate(rule.estimate(self.late[k], k), known, noise, z)
                else:
                    assert rule is not None
                    x0 = self._fitted(k, z, given, known, noise, rule)
                given.append(self._clean.prediction(k, z, x0))
            x = self._sampler.latents(given)
            path.append(x)
            self._done += 1
            self._progress(self._done, _GENERATIONS * steps)
        if rule is None:
            self._truth, self._truth_x0 = path, known
        return x

    def _fitted(
        self,
        k: int,
        z: torch.Tensor,
        given: list[torch.Tensor],
        known: dict[int, torch.Tensor],
        noise: dict[int, torch.Tensor],
        rule: _Fit,
    ) -> torch.Tensor:
        """x0 of step k by least squares over the pictures that are fitted."""
        before = sorted(known, reverse=True)[:3]
        held = known[before[0]]
        aim = self._truth_x0[k]
        gain = float(self._sampler.weights[k + 1, k + 1]) / self._clean.of_output[k]
        if rule.aim == "sequential latents" and gain:
            # What x0 has to be for the step to end there: where it ends is linear in x0.
            ends = self._sampler.latents([*given, self._clean.prediction(k, z, held)])
            aim = held + (self._truth[k + 1] - ends) / gain
        found = terms(before, k, self._clean.alpha, self._clean.sigma)
        parts = {name: evaluate(e, known, noise, z) for name, e in found.items()}
        rows = list(rule.pictures)
        a = torch.stack([p[rows].flatten().double() for p in parts.values()], 1)
        gram = a.T @ a
        floor = a.shape[0] * float((_FLOOR * held[rows].double()).square().mean())
        gram += torch.diag(gram.diag() * AIMS[rule.aim] + floor)
        solved = torch.linalg.solve(gram, a.T @ (aim - held)[rows].flatten().double()).tolist()
        by_name = dict(zip(parts, solved, strict=True))
        rule.coefficients[k] = tuple(by_name.get(name, 0.0) for name in TERMS)
        return held + sum(by_name[name] * part for name, part in parts.items())
