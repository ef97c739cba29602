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
) -> torch.Tensor:
    """The final latents of a sampler that scales no inputs and remembers nothing from step to step,
    for noise predictions. ``predict`` instead of a line that pays back what the sampler is owed;
    ``wave`` evaluates asynchronous steps, one after another, where that is not what an exact one
    does. ``watch``: whether less is done where x0 swings."""
    steps = len(alphas)
    end = steps - exact_tail
    ratios = [a / s for a, s in zip(alphas, sigmas, strict=True)]
    given: dict[int, torch.Tensor] = {}  # x0 of asynchronous steps
    known: dict[int, torch.Tensor] = {}
    noises: dict[int, torch.Tensor] = {}  # of all steps, the known ones and those under way
    waves: dict[int, tuple[int, torch.Tensor]] = {}  # by the tick that finishes them
    path = [x]  # latents before every step

    def exact(k: int) -> None:
        noise = noises[k] = denoise(path[k], k)
        known[k] = (path[k] - sigmas[k] * noise) / alphas[k]
        path.append(step(path[k], noise, k))

    def owed() -> torch.Tensor:
        """What all steps that are known by now, or lie between known ones, were given too little:
        each weighed by how much α/σ grew in it."""
        total = torch.zeros_like(x)
        for j, x0 in given.items():
            if j <= max(known) and j + 1 < steps:
                a = max(k for k in known if k <= j)
                b = min(k for k in known if k >= j)
                best = known[a] + (known[b] - known[a]) * ((j - a) / (b - a) if b > a else 0)
                total = total + (ratios[j + 1] - ratios[j]) * (best - x0)
        return total

    def trust() -> torch.Tensor:
        """How little x0 swings, by sample: see asyncdiff.sampling.predictor."""
        waves = sorted(k for k in known if k in given)
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
            if not predict and j + stride < steps:
                share = 1 / (delay + 1)
                x0 = x0 + trust() * share * owed() / (ratios[j + stride] - ratios[j])
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
        if not predict and k + 1 < steps:
            x0 = given[k] = x0 + owed() / (ratios[k + 1] - ratios[k])
        path.append(step(path[k], (path[k] - alphas[k] * x0) / sigmas[k], k))
    return path[-1]
