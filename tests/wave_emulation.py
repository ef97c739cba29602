"""The wavefront schedule, written as plainly as it can be: whole evaluations, some of them late.

An independent oracle in float64: no plan, no components, no channels, no matrices. A wave is one
evaluation of the whole denoiser at its own latents and time; that it passes through components
shows only in when its result is known.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

#: (latents of the sampler, step) -> noise prediction
Denoise = Callable[[torch.Tensor, int], torch.Tensor]
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
    components: int,
    stride: int,
    warmup: int,
    order: float,
    reach: float,
    exact_tail: int = 0,
) -> torch.Tensor:
    """The final latents of a sampler that scales no inputs, for noise predictions, uncorrected."""
    steps = len(alphas)
    known: dict[int, torch.Tensor] = {}
    waves: dict[int, tuple[int, torch.Tensor]] = {}  # by the tick that finishes them

    def exact(x: torch.Tensor, k: int) -> torch.Tensor:
        noise = denoise(x, k)
        known[k] = (x - sigmas[k] * noise) / alphas[k]
        return step(x, noise, k)

    for k in range(warmup):
        x = exact(x, k)
    for tick, k in enumerate(range(warmup, steps - exact_tail, stride)):
        waves[tick + components - 1] = (k, (x - sigmas[k] * denoise(x, k)) / alphas[k])
        if tick in waves:
            arrived, x0 = waves.pop(tick)
            known[arrived] = x0
        for j in range(k, min(k + stride, steps - exact_tail)):
            x0 = line(known, j, order, reach)
            x = step(x, (x - alphas[j] * x0) / sigmas[j], j)
    for k in range(steps - exact_tail, steps):
        x = exact(x, k)
    return x
