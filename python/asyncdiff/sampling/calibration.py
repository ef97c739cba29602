"""A predictor of clean images fitted to a model, a sampler and a shape of waves.

Where steps are large, a line through the known clean images
(:class:`asyncdiff.sampling.predictor.Line`) misses, and what misses is fed back. What the model
does between two steps is much the same for all pictures, though: so every step has weights of its
own, fitted on a few (:mod:`asyncdiff.sampling.fit`), for

- the slope and the curve of the newest known clean images,
- how far the noise in the step's latents lies from the newest known prediction's, and
- by how much that prediction's noise had changed.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import PlanError
from .clean_image import CleanImage
from .predictor import Estimate

#: Terms of a step, in the order of its coefficients.
TERMS = ("slope", "curve", "noise", "noise_slope")
_VERSION = 4


@dataclass(frozen=True)
class Shape:
    """Waves: N, S, the ticks until a prediction arrives, and the exact steps at both ends."""

    components: int
    stride: int
    delay: int
    warmup: int
    exact_tail: int


@dataclass(frozen=True)
class Calibration:
    """What :meth:`asyncdiff.AsyncDenoiser.calibrate` found; pass it as ``order``.

    ``alpha`` and ``sigma`` are those of the steps that it was fitted for. ``newest[k]`` is the
    newest step known in step k, and ``coefficients[k]`` are the weights of :data:`TERMS`; where
    another step is the newest, or they are all zero, it is held. ``gains`` says by how many dB each
    of the pictures that it was not fitted on came closer to the sequential latents than by the
    default. Where that was not enough there are no coefficients, and it stands for the default.
    ``sampler`` is the scheduler that took the steps: its class, and how it is configured.
    """

    shape: Shape
    alpha: tuple[float, ...]
    sigma: tuple[float, ...]
    newest: tuple[int, ...]
    coefficients: tuple[tuple[float, ...], ...]
    gains: tuple[float, ...] = ()
    sampler: Mapping[str, Any] = field(default_factory=dict, hash=False)

    depth = 3
    noise = True

    @property
    def taken(self) -> bool:
        """Whether it won on the pictures that it was not fitted on, so that it is used."""
        return bool(self.coefficients)

    def __str__(self) -> str:
        mean = statistics.fmean(self.gains) if self.gains else math.nan
        least = min(self.gains, default=math.nan)
        return (
            f"{'taken' if self.taken else 'left out'}: {mean:+.1f} dB over the default, at worst "
            f"{least:+.1f}, on {len(self.gains)} pictures that it was not fitted on"
        )

    def estimate(self, known: Sequence[int], step: int) -> Estimate:
        """See :class:`asyncdiff.sampling.predictor.Rule`."""
        before = [k for k in known if k <= step][-3:][::-1]
        newest = before[0]
        if newest == step or newest != self.newest[step] or not any(self.coefficients[step]):
            return Estimate({newest: 1.0})
        clean = defaultdict(float, {newest: 1.0})
        noise: defaultdict[int, float] = defaultdict(float)
        of_input = 0.0
        parts = terms(before, step, self.alpha, self.sigma)
        for name, weight in zip(TERMS, self.coefficients[step], strict=True):
            if weight and (part := parts.get(name)):
                for total, mine in ((clean, part.clean), (noise, part.noise)):
                    for k, w in mine.items():
                        total[k] += weight * w
                of_input += weight * part.of_input
        return Estimate(clean, noise, of_input)

    def check(self, shape: Shape, clean: CleanImage) -> None:
        """Raise PlanError unless a generation is one that this was fitted for."""
        for name, now in vars(shape).items():
            was = getattr(self.shape, name)
            if was != now:
                raise PlanError(
                    f"the calibration was made with {name}={was}, not {now}: call calibrate() with "
                    "these settings, or set order=None"
                )
        if self.sampler and clean.sampler and self.sampler != clean.sampler:
            raise PlanError(
                f"the calibration was made for {_scheduler(self.sampler, clean.sampler)}, not "
                f"{_scheduler(clean.sampler, self.sampler)}: call calibrate() with this scheduler, "
                "or set order=None"
            )
        levels = zip((*self.alpha, *self.sigma), (*clean.alpha, *clean.sigma), strict=False)
        same = len(self.alpha) == len(clean.alpha)
        if not same or any(not math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6) for a, b in levels):
            raise PlanError(
                f"the calibration was made for {len(self.alpha)} steps of other noise levels than "
                f"these {len(clean.alpha)}: call calibrate() with this scheduler and number of "
                "steps, or set order=None"
            )

    def to_dict(self) -> dict[str, Any]:
        """As plain data, which JSON can hold."""
        return {"version": _VERSION, **asdict(self), "terms": TERMS}

    def fingerprint(self) -> str:
        """A word that no other calibration has."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Calibration:
        """What :meth:`to_dict` made. Raises ValueError, KeyError, TypeError or AttributeError where
        it is something else."""
        rest = dict(data)
        if rest.pop("version") != _VERSION or tuple(rest.pop("terms")) != TERMS:
            raise ValueError("it is of another version")
        rest["shape"] = Shape(**rest["shape"])
        for name in ("alpha", "sigma", "newest", "gains"):
            rest[name] = tuple(rest[name])
        rest["coefficients"] = tuple(tuple(row) for row in rest["coefficients"])
        return cls(**rest)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what :meth:`save` wrote. Raises PlanError where it is something else."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise PlanError(
                f"{path} is no calibration of this version of asyncdiff ({e}): make one with "
                "calibrate()"
            ) from e


def _scheduler(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """A scheduler by its class and, where that is the other's, by what is configured otherwise."""
    name = str(one["class"])
    if name != other["class"]:
        return name
    differs = sorted(k for k in {*one, *other} if one.get(k) != other.get(k))
    return f"{name}({', '.join(f'{k}={one.get(k)!r}' for k in differs)})"


def terms(
    before: Sequence[int], step: int, alpha: Sequence[float], sigma: Sequence[float]
) -> dict[str, Estimate]:
    """The terms that there are in a step, as weights. ``before``: known steps, the newest first."""
    out = {}
    a = before[0]
    if sigma[step]:
        ratio = alpha[step] / sigma[step]
        out["noise"] = Estimate({a: -ratio}, {a: -1.0}, 1 / sigma[step])
    if len(before) > 1:
        b = before[1]
        out["slope"] = Estimate({a: 1.0, b: -1.0})
        out["noise_slope"] = Estimate({}, {a: 1.0, b: -1.0})
    if len(before) > 2:
        out["curve"] = Estimate({a: 1.0, b: -2.0, before[2]: 1.0})
    return out
