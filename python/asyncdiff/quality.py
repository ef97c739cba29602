"""Settings chosen for the user: what a quality means on these devices, for this generation.

The first steps decide what is in a picture, so they are exact: more of them where steps are large
or predictions late, and where guidance lets two devices share an exact step, so that it costs
little. The last ones are exact because what late predictions have misled the sampler by is paid
back there (:mod:`asyncdiff.sampling.predictor`). What is kept so of models whose pictures have
variety (benchmarks/yardsticks) is in docs/guide/quality.md. Where exact ways are about as fast as
that, they are picked instead.
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
#: By quality, exact steps of two components: the share of the first ones where a device runs each
#: condition, for small and for large steps; the same where they are run one component after
#: another; and how many of the last ones. The speeds that they leave of 25 steps or more, by the
#: plans of the yardsticks: at least 1.8 times one device's for "balanced" and 1.7 for "high" on two
#: devices with guidance, 3.4 for "balanced" on four.
_EXACT = {
    "high": ((0.25, 0.40), (0.16, 0.20), 2),
    "balanced": ((0.12, 0.28), (0.08, 0.10), 1),
    "fast": ((0.04, 0.08), (0.04, 0.06), 1),
}
#: From so many exact steps on ranks are made ready that share out the tokens of each: they need
#: memory for the whole denoiser, and time to prepare.
_MANY_EXACT = 5
#: Each further component adds this share of what small steps need.
_FURTHER = 0.5


@dataclass(frozen=True)
class Task:
    """What there is to do, and on what.

    ``devices``: how many. ``steps``: of the sampler. ``step``: the median of their lengths in
    log-SNR, ln(α/σ), or why waves do not serve this denoiser with this sampler. ``guided``:
    whether the batch holds two conditions, which can be taken apart. ``pictures``: in the batch,
    which can be taken apart. ``whole``: whether each device has room for the whole denoiser.
    ``tokens``: whether devices that have can share out its tokens. ``large``: whether latents have
    so many numbers that a condition, or half of the tokens, takes a device hardly more than half of
    a step's time. ``remembered``: how many steps after it are misled by what a step is paid back
    (:attr:`asyncdiff.sampling.response.Response.remembered`).
    """

    devices: int
    steps: int
    step: float | str
    guided: bool
    pictures: int
    whole: bool
    tokens: bool = False
    large: bool = False
    remembered: int = 0


@dataclass(frozen=True)
class Picked:
    """``settings``: arguments of :class:`asyncdiff.ParallelConfig`, but for the devices, of which
    the first ``devices`` are used. ``why``: for people."""

    settings: dict[str, Any]
    devices: int
    why: str

    def __str__(self) -> str:
        plain = (int, float, str)
        chosen = ", ".join(
            f"{name}={value!r}" if isinstance(value, plain) else f"{name}={value}"
            for name, value in self.settings.items()
        )
        return f"{chosen}: {self.why}"


def check_quality(quality: str) -> None:
    """Raise InputError for a quality that there is not."""
    if quality not in QUALITIES:
        raise InputError(f"quality={quality!r}: write one of {', '.join(QUALITIES)}")


def pick(
    quality: str,
    task: Task,
    prepared: Mapping[str, Any] | None = None,
    given: Mapping[str, Any] | None = None,
) -> Picked:
    """The settings that keep ``quality`` and are fastest. ``prepared``: those that are in use, and
    are kept where others would be no faster. ``given``: those that were given by hand for
    generations with asynchronous steps; exact steps are not split where there is no guidance.

    "exact" changes nothing in the pictures. "high" has more exact steps than "balanced", and that
    more than "fast". A few steps are run exactly whatever the quality is: each of them decides. So
    are all steps of large latents, but with "fast", where two devices take a condition each, or
    share out the tokens of one: that is about as fast as waves.
    """
    n = task.devices
    if n == 1:
        return Picked({"components": 1}, 1, "one device")
    if task.pictures >= n:
        why = f"{task.pictures} pictures at once: {n} devices work on them in turn, exactly"
        return Picked({"components": n, "schedule": "pipeline"}, n, why)
    if quality == "exact" or task.steps < FEW or isinstance(task.step, str):
        kept = None if quality == "exact" else _as_prepared(task, prepared)
        return kept or _exact(task, _why_exact(task, quality))
    if quality != "fast" and not given and _halves_are_fast(task):
        return _exact(task, "every step is exact, which takes two devices hardly longer")
    groups = 2 if task.guided and n >= 4 else 1
    components = n // groups
    shared = task.guided and groups == 1 and task.whole
    warmup, tail = exact_steps(quality, task.steps, task.step, components, shared)
    # So that nothing that the last steps use of earlier ones was given to pay something back.
    tail = max(tail, min(task.remembered, task.steps - warmup - 1))
    settings: dict[str, Any] = {
        "components": components,
        "schedule": "wavefront",
        "warmup": warmup,
        "exact_tail": tail,
        "guidance": "split" if groups == 2 else "batched",
        "exact_mode": "split" if shared else "chain",
    }
    if task.tokens and not shared and components > 1 and warmup >= _MANY_EXACT:
        settings["exact_mode"] = "sequence"
    settings |= given or {}
    if not task.guided and settings["exact_mode"] == "split":
        settings["exact_mode"] = "chain"
    why = f"{components} components work at once, {_ends(settings, task.steps)}"
    if given:
        why += f" ({', '.join(sorted(given))} by hand)"
    if groups == 2:
        why += "; each condition of the guidance has devices of its own"
    elif settings["exact_mode"] == "split":
        why += ", a condition on each of two devices"
    elif not task.whole:
        why += "; not each device has room for the whole denoiser"
    if settings["exact_mode"] == "sequence":
        why += "; in exact steps devices share out the picture's tokens"
    return Picked(settings, groups * components, why)


def _ends(settings: Mapping[str, Any], steps: int) -> str:
    """Which steps of so many are exact, for people."""
    first, last = settings["warmup"], settings["exact_tail"]
    if not isinstance(first, int):
        return f"the first steps exact for as long as they change much, and the last {last}"
    if first + last >= steps:
        return f"all {steps} steps exact"
    return f"the first {first} and the last {last} of {steps} steps exact"


def exact_steps(
    quality: str, steps: int, step: float, components: int, shared: bool
) -> tuple[int, int]:
    """How many of the first and of the last steps are exact. ``step``: the median length of the
    sampler's steps in log-SNR; ``shared``: two devices share an exact step, a condition each."""
    by_condition, by_component, tail = _EXACT[quality]
    small, large = by_condition if shared else by_component
    share = min(1.0, max(0.0, (step - SMALL_STEP) / (LARGE_STEP - SMALL_STEP)))
    of_two = small + (large - small) * share
    wanted = of_two + _FURTHER * small * (components - 2)
    return max(1, min(steps - tail, math.ceil(wanted * steps - 1e-9))), tail


def _as_prepared(task: Task, prepared: Mapping[str, Any] | None) -> Picked | None:
    """Every step exact with waves that are there, where that takes no longer than other ways."""
    if isinstance(task.step, str) or not prepared or prepared.get("schedule") != "wavefront":
        return None
    split = "split" in (prepared["guidance"], prepared["exact_mode"])
    if task.guided and task.whole and not split:
        return None
    if task.tokens and "sequence" not in prepared.values() and not split:
        return None
    groups = 2 if prepared["guidance"] == "split" else 1
    if groups == 2 and not task.guided:
        return None
    why = f"each of these {task.steps} steps is exact, on the ranks that there are"
    settings = {**prepared, "warmup": task.steps, "exact_tail": 0}
    served = {"split": task.guided and task.whole, "sequence": task.tokens}
    if not served.get(settings["exact_mode"], True):
        settings["exact_mode"] = "chain"
    return Picked(settings, groups * prepared["components"], why)


def _halves_are_fast(task: Task) -> bool:
    """Whether two devices, or two for each condition, are about as fast as waves if they take half
    of each step, by what was measured of large latents (docs/guide/quality.md)."""
    if task.devices == 4:
        return task.large and task.guided and task.tokens
    return task.large and task.devices == 2 and (task.tokens or (task.guided and task.whole))


def _why_exact(task: Task, quality: str) -> str:
    if quality == "exact":
        return "every step is exact"
    if task.steps < FEW:
        return f"{task.steps} steps are so few that each decides: all are exact"
    return f"{task.step}: every step is exact"


def _exact(task: Task, because: str) -> Picked:
    """All that changes nothing."""
    n, steps = task.devices, task.steps
    if task.tokens and not (task.guided and n == 2):
        return _by_tokens(task, because)
    if task.guided and task.whole:
        why = f"{because}, a condition of the guidance on each of two devices"
        return Picked({"components": 1, "guidance": "split"}, 2, why)
    if not task.whole:
        why = f"{because}, one component after another, as not each device has room for all of them"
        return Picked({"components": n, "warmup": steps}, n, why)
    why = f"{because}; devices cannot share out conditions, {n} pictures or tokens: one device"
    return Picked({"components": 1}, 1, why)


def _by_tokens(task: Task, because: str) -> Picked:
    """Every step exact, the tokens shared out among all devices, or among half of them for each
    condition."""
    settings: dict[str, Any] = {"components": task.devices, "schedule": "sequence"}
    why = f"{because}; devices share out the picture's tokens"
    if task.guided and task.devices % 2 == 0:
        settings |= {"components": task.devices // 2, "guidance": "split"}
        why += ", half of them for each condition of the guidance"
    return Picked(settings, task.devices, why)
