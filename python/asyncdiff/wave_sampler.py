"""A sampler whose predictions come late, as small matrices: one step of arithmetic a tick.

What the sampler does with the waves' predictions (clean images from them, extrapolation, steps that
are taken again) is linear in the first latents and in the predictions. So every latent is followed
as weights over those inputs, and what must be remembered from tick to tick follows from the weights
as it does for a scheduler of its own: see :mod:`asyncdiff.sampler`. The same kernel runs both.
"""

from __future__ import annotations

import functools

import torch

from .actions import Tick
from .clean_image import CleanImage
from .plan import Plan
from .predictor import Rule, evaluate
from .sampler import LinearSampler, realise


@functools.lru_cache(maxsize=8)
def wave_samplers(
    sampler: LinearSampler, clean: CleanImage, plan: Plan, rule: Rule, correct: bool
) -> list[LinearSampler]:
    """For every rank: the latents that its runs want, tick by tick; the last ones are the result.

    "Step" k of such a sampler is tick k of the plan, and takes the prediction that the tick
    delivers (any, where it delivers none: its weight is zero). All have the same width.

    ``correct``: an exact clean image also replaces its prediction in the steps taken since; what
    arrives while the waves drain always does.

    Raises SchedulerError where too much would have to be remembered.
    """
    course = _Course(sampler, clean, plan, rule, correct)
    rows: list[list[torch.Tensor]] = [[] for _ in range(plan.ranks)]
    scales: list[list[float]] = [[] for _ in range(plan.ranks)]
    for tick in plan.ticks:
        course.begin(tick)
        for rank in range(plan.ranks):
            step = next((a.latents for a in tick.runs if a.rank == rank), course.newest)
            assert step is not None
            rows[rank].append(course.latents[step])
            scales[rank].append(float(sampler.scales[step]) if step < plan.steps else 1.0)
        course.end(tick)
    found = []
    for mine in rows:
        mine.append(course.states[plan.steps][0])
        found.append(realise(torch.stack(mine), f"a wavefront of {sampler.scheduler}"))
    width = max(steps.shape[1] for steps in found)
    times = torch.arange(len(plan.ticks))
    return [
        LinearSampler(
            sampler.scheduler,
            times,
            torch.tensor(scale, dtype=torch.float64),
            _padded(steps, width),
            sampler.error,
        )
        for scale, steps in zip(scales, found, strict=True)
    ]


class _Course:
    """The generation in weights: a quantity is a vector over (x_0, prediction of tick 0, 1, …)."""

    def __init__(
        self, sampler: LinearSampler, clean: CleanImage, plan: Plan, rule: Rule, correct: bool
    ) -> None:
        self._sampler = sampler
        self._clean = clean
        self._rule = rule
        self._correct = correct
        self._columns = 1 + len(plan.ticks)
        start = torch.zeros(sampler.width, self._columns, dtype=torch.float64)
        start[0, 0] = 1
        #: the sampler's state before a step, corrected where it has been taken again
        self.states = {0: start}
        #: the latents with which a step's wave was started: what all its runs use
        self.latents: dict[int, torch.Tensor] = {}
        self.newest = 0
        self._known: dict[int, torch.Tensor] = {}
        self._noise: dict[int, torch.Tensor] = {}

    def begin(self, tick: Tick) -> None:
        """The latents before a tick are the newest."""
        if tick.serves:
            self.newest = tick.serves[0]
            self.latents[self.newest] = self.states[self.newest][0]

    def end(self, tick: Tick) -> None:
        """Take the tick's prediction and the steps that it serves."""
        again = None
        for step in tick.delivers:
            unit = torch.zeros(self._columns, dtype=torch.float64)
            unit[1 + tick.index] = 1
            z = self._sampler.scales[step] * self.latents[step]
            self._known[step] = self._clean.x0(step, z, unit)
            self._noise[step] = self._clean.noise(step, z, self._known[step])
            if self._correct or not tick.serves:
                again = step
        last = max(self.states)
        first = last if again is None else again
        for k in range(first, max(last, *(j + 1 for j in tick.serves), 0)):
            self.states[k + 1] = self._stepped(k)

    def _stepped(self, k: int) -> torch.Tensor:
        """The state after step k, with its clean image known or extrapolated."""
        state, step = self.states[k], self._sampler.steps[k]
        z = self._sampler.scales[k] * state[0]
        x0 = evaluate(self._rule.estimate(sorted(self._known), k), self._known, self._noise, z)
        prediction = self._clean.prediction(k, z, x0)
        return step @ torch.cat([state, prediction[None]])


def _padded(steps: torch.Tensor, width: int) -> torch.Tensor:
    """The same steps with more memory, which stays zero."""
    count, own = steps.shape[:2]
    out = torch.zeros(count, width, width + 1, dtype=torch.float64)
    out[:, :own, :own] = steps[:, :, :own]
    out[:, :own, width] = steps[:, :, own]
    return out
