"""The wavefront schedule, written as plainly as it can be: whole evaluations, some of them late.

An independent oracle in float64: no plan, no components, no channels, no matrices. A wave is one
evaluation of the whole denoiser at its own latents and time; that it passes through components
shows only in when its result is known. With a short delay its components also see values of the
wave before: :class:`emulation.Waves`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

#: (latents of the sampler, step) -> noise prediction
Denoise = Callable[[torch.Tensor, int], torch.Tensor]
#: (known x0 by step, noise predictions by step, step, its latents) -> x0
Predict = Callable[
    [dict[int, torch.Tensor], dict[int, torch.Tensor], int, torch.Tensor], torch.Tensor
]
#: (latents, noise prediction, step) -> the next latents
Step = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def line(known: dict[int, torch.Tensor], k: int, order: float, reach: float) -> torch.Tensor:
    """x0 of step k from the two newest known ones before it."""
    steps = sorted(j for j in known if j <= k)
    a = steps[-1]
    if a == k or len(steps) == 1:
        return known[a]
    b = steps[-2]
    share = min((k - a) / (a - b), reach)
    return known[a] + order * share * (known[a] - known[b])


def generate(
    denoise: Denoise,
    step: Step,
    x: torch.Tensor,
    alphas: list[float],
    sigmas: list[float],
    *,
    delay: int,
    stride: int,
    warmup: int,
    order: float,
    reach: float,
    exact_tail: int = 0,
    predict: Predict | None = None,
    wave: Denoise | None = None,
    watch: bool = True,
    carry: Callable[[float, float, float, float], float] = lambda a, s, a2, s2: a2 / a,
) -> torch.Tensor:
    """The final latents of DDIM, for noise predictions. ``predict`` instead of a line that pays
    back what the sampler is owed; ``wave`` evaluates asynchronous steps, one after another, where
    that is not what an exact one does. ``watch``: whether less is done where x0 swings. ``carry``:
    of what latents are off by, what they still are a step on, where predictions stay what they are.
    """
    steps = len(alphas)
    end = steps - exact_tail
    levels = [*zip(alphas, sigmas, strict=True), (1.0, 0.0)]
    given: dict[int, torch.Tensor] = {}  # x0 of asynchronous steps
    known: dict[int, torch.Tensor] = {}
    noises: dict[int, torch.Tensor] = {}  # of all steps, the known ones and those under way
    waves: dict[int, tuple[int, torch.Tensor]] = {}  # by the tick that finishes them
    path = [x]  # latents before every step

    def exact(k: int) -> None:
        noise = noises[k] = denoise(path[k], k)
        known[k] = (path[k] - sigmas[k] * noise) / alphas[k]
        path.append(step(path[k], noise, k))

    def gain(k: int) -> float:
        """By how much x0 in a step moves the latents after it."""
        return levels[k + 1][0] - levels[k + 1][1] * alphas[k] / sigmas[k]

    def owed(end: int) -> torch.Tensor:
        """By how much the latents before step ``end`` would differ, had all steps that are known by
        now, or lie between known ones, been given what is known."""
        total = torch.zeros_like(x)
        for j in range(end):
            total = carry(*levels[j], *levels[j + 1]) * total
            if j in given and j <= max(known):
                a = max(k for k in known if k <= j)
                b = min(k for k in known if k >= j)
                best = known[a] + (known[b] - known[a]) * ((j - a) / (b - a) if b > a else 0)
                total = total + gain(j) * (best - given[j])
        return total

    def moved(k: int, end: int) -> float:
        """By how much x0 in all steps from k on moves the latents before step ``end``."""
        total = 0.0
        for j in range(k, end):
            total = carry(*levels[j], *levels[j + 1]) * total + gain(j)
        return total

    def payment(j: int, count: int) -> torch.Tensor:
        """What is added to x0 in so many steps, so that nothing is owed after them; in a short one
        as if it were as long as those whose errors have just become known."""
        count = min(count, steps - j)
        gains = [moved(k, k + count) for k in range(max(0, j - delay * stride), j + 1)]
        return owed(j + count) / max(gains)

    def trust() -> torch.Tensor:
        """How little x0 swings, by sample: see asyncdiff.sampling.predictor."""
        waves = sorted(k for k in known if k in given and k < end)
        moves = [known[b] - known[a] for a, b in itertools.pairwise(waves)]
        worst = torch.zeros((), dtype=x.dtype)
        rest = tuple(range(1, x.dim()))
        for one, next_one in itertools.pairwise(moves if watch else []):
            back = -(one * next_one).sum(rest, keepdim=True) / (one * one).sum(rest, keepdim=True)
            worst = torch.maximum(0.9 * worst, back.clamp(0, 1))
        return (1 - worst / 0.2).clamp(min=0)

    def walk(first: int, last: int) -> None:
        for j in range(first, last):
            x0 = predict(known, noises, j, path[j]) if predict else None
            x0 = line(known, j, float(0), reach) if x0 is None else x0
            if not predict:
                x0 = x0 + trust() * (line(known, j, order, reach) - x0)
            if not predict:
                x0 = x0 + trust() * payment(j, stride) / (delay + 1)
            given[j] = x0
            path.append(step(path[j], (path[j] - alphas[j] * x0) / sigmas[j], j))

    for k in range(warmup):
        exact(k)
    for tick, k in enumerate(range(warmup, end, stride)):
        start = path[k]
        noises[k] = (wave or denoise)(start, k)
        waves[tick + delay] = k, (start - sigmas[k] * noises[k]) / alphas[k]
        if tick in waves:
            arrived, x0 = waves.pop(tick)
            known[arrived] = x0
        walk(k, min(k + stride, end))
    # What is under way arrives with the first exact step, which pays all that is owed by then.
    known |= dict(waves.values())
    for k in range(end, steps):
        noises[k] = denoise(path[k], k)
        known[k] = x0 = (path[k] - sigmas[k] * noises[k]) / alphas[k]
        if not predict:
            x0 = given[k] = x0 + payment(k, 1)
        path.append(step(path[k], (path[k] - alphas[k] * x0) / sigmas[k], k))
    return path[-1]
