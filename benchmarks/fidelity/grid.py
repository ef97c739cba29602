"""The rows of the fidelity benchmark."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from asyncdiff.quality import QUALITIES
from asyncdiff.sampling.fit import LEAST
from fidelity.chosen import Chosen
from fidelity.distrifusion import DistriFusion
from fidelity.faster_diffusion import FasterDiffusion, paper_keys
from fidelity.method import Method
from fidelity.ours import Asynchronous, Calibrated
from fidelity.simple import FewerSteps, GuidanceSplit

#: Exact steps at the beginning, and at the end.
ENDS = ((1, 0), (3, 0), (5, 0), (9, 0), (1, 1), (1, 2), (1, 4))
#: DistriFusion's synchronous steps.
SYNCHRONOUS = (1, 3, 5, 9)
#: (components, stride).
SHAPES = ((2, 1), (3, 1), (4, 1), (2, 2), (3, 2))
#: Of these, those whose waves are also run one tick late, with values of the wave before inside.
SHORT = ((3, 1), (4, 1), (3, 2))
#: Those that are also run with guidance split, on twice the devices.
SPLIT = ((2, 1), (2, 2))
#: Our own rows: what they are called, and their schedule.
OURS = (
    ("asyncdiff", "asyncdiff"),
    ("wavefront", "wavefront"),
)
#: Of these, what further rows are run with; calibrated waves are fitted for each.
FURTHER_ENDS = ((1, 0), (5, 0), (1, 1), (1, 4))
#: Shares of the steps that are left where fewer are taken.
SHARES = (0.26, 0.3, 0.34, 0.4, 0.46, 0.5, 0.54, 0.58, 0.62, 0.66, 0.8, 0.9)
#: On how many devices settings are picked.
DEVICES = (2, 3, 4)


def methods(
    device: str, pipe: Any, steps: int, others: Sequence[str], guided: bool, quick: bool
) -> Iterator[Method]:
    """Every row for this pipeline; ``quick``: one of each kind. ``others``: prompts that are not
    drawn, to calibrate on. ``guided``: whether each picture has two conditions."""
    for devices in DEVICES[:1] if quick else DEVICES:
        for quality in QUALITIES[2:3] if quick else QUALITIES:
            yield Chosen(quality, devices, device, guided)
    # Shapes outside: what is prepared for one serves all kinds of the same schedule.
    for n, s in SHAPES[:1] if quick else SHAPES:
        for kind, schedule in OURS:
            for w, tail in ENDS[:1] if quick else ENDS:
                if w + tail < steps:
                    yield Asynchronous(kind, device, n, s, w, schedule=schedule, tail=tail)
        more: dict[str, dict[str, Any]] = {}
        if (n, s) in SHORT:
            more["wavefront, delay 1"] = {"delay": 1}
        if (n, s) in SPLIT:
            more["wavefront, guidance split"] = {"split": True}
        for kind, options in more.items():
            for w, tail in FURTHER_ENDS:
                if w + tail < steps and not quick:
                    options |= {"schedule": "wavefront", "tail": tail}
                    yield Asynchronous(kind, device, n, s, w, **options)
        for w, tail in FURTHER_ENDS[:1] if quick else FURTHER_ENDS:
            if w + tail < steps and len(others) >= LEAST:
                yield Calibrated(
                    "wavefront, calibrated",
                    device,
                    n,
                    s,
                    w,
                    schedule="wavefront",
                    tail=tail,
                    texts=others,
                )
    for share in SHARES[1:2] if quick else SHARES:
        yield FewerSteps(max(1, round(share * steps)))
    yield GuidanceSplit()
    if hasattr(pipe, "unet"):  # a transformer has no encoder
        yield from _faster_diffusion(quick)
    for patches in (2,) if quick else (2, 4):
        for synchronous in SYNCHRONOUS[:1] if quick else SYNCHRONOUS:
            if synchronous < steps:
                yield DistriFusion(patches, synchronous)


def _faster_diffusion(quick: bool) -> Iterator[Method]:
    for devices in (2,) if quick else (1, 2, 3, 4):
        name = f"Faster Diffusion, {devices} devices"
        yield FasterDiffusion(f"{name}, the paper's keys", devices, paper_keys)
    if not quick:
        for every in (2, 3, 4):
            keys = functools.partial(_uniform, every)
            name = f"Faster Diffusion, {every} devices, every {every} steps"
            yield FasterDiffusion(name, every, keys)


def _uniform(every: int, steps: int) -> range:
    return range(0, steps, every)
