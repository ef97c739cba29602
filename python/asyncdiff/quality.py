"""Settings chosen for the user: what a quality means on these devices, for this generation.

What decides is how many of the first steps are exact: there the picture is made, and what is lost
there is not won back later. How many it takes depends on how late predictions arrive and on how
large the sampler's steps are. The shares below are a first choice: what they keep on models whose
pictures have variety (benchmarks/yardsticks) is not measured yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import InputError

QUALITIES = ("exact", "high", "balanced", "fast")
DEFAULT = "balanced"
#: The default, unless settings are given by hand.
AUTO = "auto"
#: Fewer steps than this are all decisive: each is exact.
FEW = 10
#: Steps in log-SNR, ln(α/σ), by their median: up to the first they are small, from the second on
#: large.
SMALL_STEP, LARGE_STEP = 0.12, 0.23
#: By quality, the share of steps that are exact at the beginning, where steps are small and where
#: they are large, of two components; each further one adds a share of the first of them.
_SHARES = {"high": (0.18, 0.36), "balanced": (0.12, 0.32), "fast": (0.04, 0.12)}
_FURTHER = 0.5


@dataclass(frozen=True)
class Task:
    """What there is to do, and on what.

    ``devices``: how many. ``steps``: of the sampler. ``step``: the median of their lengths in
    log-SNR, ln(α/σ); None where the scheduler does not tell, or waves do not serve the denoiser.
    ``guided``: whether the batch holds two conditions, which can be taken apart. ``pictures``: in
    the batch, which can be taken apart. ``whole``: whether a device has room for the whole
    denoiser.
    """

    devices: int
    steps: int
    step: float | None
    guided: bool
    pictures: int
    whole: bool


@dataclass(frozen=True)
class Picked:
    """``settings``: arguments of :class:`asyncdiff.ParallelConfig`, but for the devices, of which
    the first ``devices`` are used. ``why``: for people."""

    settings: dict[str, Any]
    devices: int
    why: str

    def __str__(self) -> str:
        chosen = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"{chosen}: {self.why}"


def check_quality(quality: str) -> None:
    """Raise InputError for a quality that there is not."""
    if quality not in QUALITIES:
        raise InputError(f"quality={quality!r}: write one of {', '.join(QUALITIES)}")


def pick(quality: str, task: Task, prepared: Mapping[str, Any] | None = None) -> Picked:
    """The settings that keep ``quality`` and are fastest. ``prepared``: those that are in use, and
    are kept where others would be no faster.

    "exact" changes nothing in the pictures. "high" has more exact steps than "balanced", and that
    more than "fast". A few steps are run exactly whatever the quality is: each of them decides.
    """
    n = task.devices
    if n == 1:
        return Picked({"components": 1}, 1, "one device")
    if task.pictures >= n:
        why = f"{task.pictures} pictures at once: {n} devices work on them in turn, exactly"
        return Picked({"components": n, "schedule": "pipeline"}, n, why)
    few = task.steps < FEW
    if quality == "exact" or few or task.step is None:
        kept = None if quality == "exact" else _as_prepared(task, prepared)
        return kept or _exact(task, few, quality)
    groups = 2 if task.guided and n >= 4 else 1
    components = n // groups
    warmup = exact_steps(quality, task.steps, task.step, components)
    settings: dict[str, Any] = {
        "components": components,
        "schedule": "wavefront",
        "warmup": warmup,
        "guidance": "split" if groups == 2 else "batched",
        "warmup_mode": "split" if task.guided and groups == 1 and task.whole else "chain",
    }
    why = f"{components} components work at once, the first {warmup} of {task.steps} steps exact"
    if groups == 2:
        why += "; each condition of the guidance has devices of its own"
    elif settings["warmup_mode"] == "split":
        why += ", a condition on each of two devices"
    return Picked(settings, groups * components, why)


def exact_steps(quality: str, steps: int, step: float, components: int) -> int:
    """How many of the first steps are exact. ``step``: the median length of the sampler's steps in
    log-SNR."""
    small, large = _SHARES[quality]
    share = min(1.0, max(0.0, (step - SMALL_STEP) / (LARGE_STEP - SMALL_STEP)))
    of_two = small + (large - small) * share
    wanted = of_two + _FURTHER * small * (components - 2)
    return max(1, min(steps, math.ceil(wanted * steps - 1e-9)))


def _as_prepared(task: Task, prepared: Mapping[str, Any] | None) -> Picked | None:
    """Every step exact with waves that are there, where that takes no longer than other ways."""
    if not prepared or prepared.get("schedule") != "wavefront":
        return None
    split = "split" in (prepared["guidance"], prepared["warmup_mode"])
    if task.guided and task.whole and not split:
        return None
    groups = 2 if prepared["guidance"] == "split" else 1
    if groups == 2 and not task.guided:
        return None
    why = f"each of these {task.steps} steps is exact, on the ranks that there are"
    settings = {**prepared, "warmup": task.steps}
    if not task.guided:
        settings["warmup_mode"] = "chain"
    return Picked(settings, groups * prepared["components"], why)


def _exact(task: Task, few: bool, quality: str) -> Picked:
    """All that changes nothing."""
    n, steps = task.devices, task.steps
    because = "waves do not know this sampler's noise levels: every step is exact"
    if quality == "exact":
        because = "every step is exact"
    elif few:
        because = f"{steps} steps are so few that each decides: all are exact"
    if task.guided and task.whole:
        why = f"{because}, a condition of the guidance on each of two devices"
        return Picked({"components": 1, "guidance": "split"}, 2, why)
    if not task.whole:
        why = f"{because}, one component after another, as no device has room for all of them"
        return Picked({"components": n, "warmup": steps}, n, why)
    why = f"{because}; without guidance, and with fewer than {n} pictures, nothing can be shared"
    return Picked({"components": 1}, 1, f"{why}: one device")
