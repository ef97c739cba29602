"""Fit a :class:`asyncdiff.calibration.Calibration` to a model, by simulating waves.

Step after step, the coefficients of a step are fitted to what is known then, and the pictures go on
with them: so each step is fitted on what the earlier ones really lead to, not on what a sequential
run would have had ("forward training": Ross and Bagnell, "Efficient Reductions for Imitation
Learning", 2010). Two things to aim at are tried: the clean image that leads the sampler back to the
sequential latents, and the clean image of the step's own exact prediction. Half of the pictures are
fitted, the other half says which is better, or whether the line is; then all are fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .calibration import TERMS, Calibration, terms
from .clean_image import CleanImage
from .errors import InputError
from .predictor import Line, evaluate
from .sampler import LinearSampler
from .wavefront import delay

#: (step, denoiser input) -> the exact prediction, guidance applied; floating point, of that shape
Exact = Callable[[int, torch.Tensor], torch.Tensor]
#: What a fit aims at, and the share of each term's own size by which coefficients are held back.
AIMS = {"sequential latents": 0.01, "own clean image": 0.3}
#: Terms smaller than this share of the clean image get little weight: they are rounding.
_FLOOR = 2e-3


@dataclass(frozen=True)
class Shape:
    """The waves: N, S and the exact steps at both ends."""

    components: int
    stride: int
    warmup: int
    exact_tail: int


@dataclass
class _Fit:
    """What a simulation fits: to what, and on which pictures."""

    aim: str
    pictures: Sequence[int]
    coefficients: dict[int, tuple[float, ...]]


def fit(
    exact: Exact,
    latents: torch.Tensor,
    sampler: LinearSampler,
    clean: CleanImage,
    shape: Shape,
    order: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """The calibration of these waves, from ``latents``: the first ones of at least two pictures.

    ``order``: of the line that is tried beside. ``progress`` is told steps done, and of how many.
    Runs five generations in turn, every step of them exactly once.
    """
    pictures = len(latents)
    if pictures < 2:
        raise InputError(
            "a calibration needs at least two pictures, half of them to judge by: eight or more "
            "are better"
        )
    simulation = _Simulation(exact, latents.float(), sampler, clean, shape, progress)
    truth = simulation.sequential()
    fitted, judging = range(0, pictures, 2), list(range(1, pictures, 2))

    def distance(last: torch.Tensor) -> float:
        a, b = last[judging].double(), truth[-1][judging].double()
        return float((a - b).norm() / b.norm())

    name = f"line of order {order:.2g}"
    tried = {name: distance(simulation.waves(truth, Line(order)))}
    for aim in AIMS:
        tried[aim] = distance(simulation.waves(truth, _Fit(aim, fitted, {})))
    best = min(tried, key=lambda k: tried[k])
    if best in AIMS:
        final = _Fit(best, range(pictures), {})
        simulation.waves(truth, final)
        found = final.coefficients
    else:
        found = simulation.line(order)
    progress(1, 1)
    steps = range(len(clean.alpha))
    return Calibration(
        **vars(shape),
        alpha=clean.alpha,
        sigma=clean.sigma,
        newest=tuple(simulation.newest.get(k, k) for k in steps),
        coefficients=tuple(found.get(k, (0.0,) * len(TERMS)) for k in steps),
        tried=tried,
    )


class _Simulation:
    """Generations of all pictures at once, with every step's exact prediction at hand."""

    def __init__(
        self,
        exact: Exact,
        latents: torch.Tensor,
        sampler: LinearSampler,
        clean: CleanImage,
        shape: Shape,
        progress: Callable[[int, int], None],
    ) -> None:
        self._exact, self._latents = exact, latents
        self._sampler, self._clean, self._shape = sampler, clean, shape
        self._steps = len(clean.alpha)
        self._progress, self._done = progress, 0
        end = self._steps - shape.exact_tail
        #: the first step of the tick that serves an asynchronous step
        self._tick = {k: k - (k - shape.warmup) % shape.stride for k in range(shape.warmup, end)}
        #: steps whose exact prediction becomes known
        self.starts = [k for k in range(self._steps) if self._tick.get(k, k) == k]
        late = delay(shape.components, shape.stride)
        #: the newest of them that is known in an asynchronous step
        self.newest = {
            k: max(j for j in self.starts if j <= tick - late or j < shape.warmup)
            for k, tick in self._tick.items()
        }

    def sequential(self) -> list[torch.Tensor]:
        """The latents before every step, and the last ones."""
        state, path = self._start(), [self._latents]
        for k in range(self._steps):
            state = self._stepped(k, state, self._prediction(k, self._input(k, state)))
            path.append(state[0])
        return path

    def line(self, order: float) -> dict[int, tuple[float, ...]]:
        """The coefficients that make a line of this order."""
        out = {}
        for k, newest in self.newest.items():
            known = [j for j in self.starts if j <= newest]
            slope = Line(order).estimate(known, k).clean[newest] - 1
            out[k] = tuple(slope if name == "slope" else 0.0 for name in TERMS)
        return out

    def waves(self, truth: list[torch.Tensor], rule: Line | _Fit) -> torch.Tensor:
        """The last latents, when clean images are predicted so."""
        state = self._start()
        known: dict[int, torch.Tensor] = {}
        noise: dict[int, torch.Tensor] = {}
        for k in range(self._steps):
            z = self._input(k, state)
            prediction = self._prediction(k, z)
            own = self._clean.x0(k, z, prediction)
            if k in self._tick:
                arrived = [j for j in known if j <= self.newest[k]]
                if isinstance(rule, Line):
                    x0 = evaluate(rule.estimate(arrived, k), known, noise, z)
                else:
                    x0 = self._fitted(k, z, own, state, truth, arrived, known, noise, rule)
                prediction = self._clean.prediction(k, z, x0)
            if k in self.starts:
                known[k], noise[k] = own, self._clean.noise(k, z, own)
            state = self._stepped(k, state, prediction)
        return state[0]

    def _fitted(
        self,
        k: int,
        z: torch.Tensor,
        own: torch.Tensor,
        state: list[torch.Tensor],
        truth: list[torch.Tensor],
        arrived: list[int],
        known: dict[int, torch.Tensor],
        noise: dict[int, torch.Tensor],
        rule: _Fit,
    ) -> torch.Tensor:
        """x0 of step k by least squares over the pictures that are fitted."""
        before = sorted(arrived, reverse=True)[:3]
        held = known[before[0]]
        aim = own
        gain = float(self._sampler.steps[k, 0, -1]) / self._clean.of_output[k]
        if rule.aim == "sequential latents" and gain:
            # What x0 has to be for the step to end there: where it ends is linear in x0.
            ends = self._stepped(k, state, self._clean.prediction(k, z, held))[0]
            aim = held + (truth[k + 1] - ends) / gain
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

    def _prediction(self, k: int, z: torch.Tensor) -> torch.Tensor:
        self._done += 1
        out = self._exact(k, z).float()
        self._progress(self._done, 5 * self._steps)
        return out

    def _start(self) -> list[torch.Tensor]:
        return [self._latents] + [torch.zeros_like(self._latents)] * (self._sampler.width - 1)

    def _input(self, k: int, state: list[torch.Tensor]) -> torch.Tensor:
        return state[0] * float(self._sampler.scales[k])

    def _stepped(
        self, k: int, state: list[torch.Tensor], prediction: torch.Tensor
    ) -> list[torch.Tensor]:
        inputs = torch.stack([*state, prediction])
        matrix = self._sampler.steps[k].to(inputs)
        return list(torch.tensordot(matrix, inputs, 1))
