"""The rows of the fidelity benchmark."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from fidelity.distrifusion import DistriFusion
from fidelity.faster_diffusion import FasterDiffusion, paper_keys
from fidelity.method import Method
from fidelity.ours import Asynchronous
from fidelity.simple import FewerSteps, GuidanceSplit

#: Exact steps.
WARMUPS = (1, 3, 5, 9)
#: (components, stride).
SHAPES = ((2, 1), (3, 1), (4, 1), (2, 2), (3, 2))
WAVES = ((2, 1), (3, 1), (4, 1), (2, 2), (3, 2))
#: By how much clean images are extrapolated.
ORDERS = (1.0, 0.5, 0.0)
#: Shares of the steps that are left where fewer are taken.
SHARES = (0.34, 0.5, 0.66, 0.8, 0.9)


def methods(device: str, sampler: str, steps: int, quick: bool) -> Iterator[Method]:
    """Every row for this sampler; ``quick``: one of each kind."""
    for n, s in SHAPES[:1] if quick else SHAPES:
        for w in WARMUPS[:1] if quick else WARMUPS:
            if w < steps:
                yield Asynchronous(f"asyncdiff N={n} S={s} w={w}", device, n, s, w)
    for n, s in WAVES[:1] if quick else WAVES:
        for order in ORDERS[:1] if quick else ORDERS:
            for w in WARMUPS[:1] if quick else WARMUPS:
                if w < steps:
                    name = f"wavefront, order {order:g} N={n} S={s} w={w}"
                    yield Asynchronous(name, device, n, s, w, schedule="wavefront", order=order)
    for share in SHARES[1:2] if quick else SHARES:
        yield FewerSteps(max(1, round(share * steps)))
    yield GuidanceSplit()
    for devices in (2,) if quick else (1, 2, 3, 4):
        name = f"Faster Diffusion, {devices} devices"
        yield FasterDiffusion(f"{name}, the paper's keys", devices, paper_keys)
    if not quick:
        for every in (2, 3, 4):
            keys = functools.partial(_uniform, every)
            name = f"Faster Diffusion, {every} devices, every {every} steps"
            yield FasterDiffusion(name, every, keys)
    for patches in (2,) if quick else (2, 4):
        for synchronous in WARMUPS[:1] if quick else WARMUPS:
            if synchronous < steps:
                yield DistriFusion(patches, synchronous)


def _uniform(every: int, steps: int) -> range:
    return range(0, steps, every)
