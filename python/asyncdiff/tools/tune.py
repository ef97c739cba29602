"""The fastest setting that keeps a wanted fidelity, for a pipeline and prompts of one's own."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..config import Devices
from ..errors import InputError, TuneError
from ..graph.capture import capture
from ..graph.example_inputs import example_inputs
from ..graph.signature import parse
from ..integrations.diffusers.denoisers import find_denoiser
from ..integrations.diffusers.pipeline import parallelize
from ..partition.cost import measure
from ..partition.partition import partition
from ..progress import Progress, tell, within
from ..runtime.devices import resolve
from ..sampling.calibration import Calibration
from ..sampling.fit import check_pictures
from ..schedule.plan import ASYNCHRONOUS, build, rank_count
from ..schedule.simulate import Timing, predict
from .fidelity import Fidelity, Learned, fidelity, lpips
from .prediction import links_between

#: Exact steps that are tried: at the beginning, and at the end, where a few do the most.
ENDS = ((1, 0), (1, 1), (1, 2), (3, 2), (5, 4), (9, 4), (13, 6), (17, 8), (25, 8), (33, 8))


@dataclass(frozen=True)
class Trial:
    """One setting that was tried: arguments of ``parallelize``, and what they gave.

    ``speedup`` is predicted from the components' measured times and the links' speed, over the
    plain pipeline's denoiser on one device.
    """

    arguments: dict[str, Any]
    speedup: float
    fidelity: Fidelity
    #: of calibrated waves: the ``order`` that belongs to the arguments
    calibration: Calibration | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "arguments": self.arguments,
            "speedup": self.speedup,
            "fidelity": self.fidelity.to_dict(),
            "calibrated": self.calibration is not None,
        }

    def __str__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self.arguments.items())
        learned = "".join(f", {k} {v:.4f}" for k, v in self.fidelity.learned.items())
        settings += ", calibrated" if self.calibration is not None else ""
        return (
            f"{settings}: predicted {self.speedup:.2f} times the speed, "
            f"{self.fidelity.psnr_db:.1f} dB, SSIM {self.fidelity.ssim:.3f}{learned}"
        )


@dataclass(frozen=True)
class Tuned:
    """What was chosen, and everything that was tried, in order."""

    chosen: Trial
    tried: list[Trial]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"chosen": self.chosen.to_dict(), "tried": [t.to_dict() for t in self.tried]}


def tune(
    pipe: Any,
    prompts: Sequence[str],
    *,
    psnr_db: float | None = None,
    max_lpips: float | None = None,
    devices: Devices = None,
    ranks: int | None = None,
    num_inference_steps: int = 50,
    seed: int = 0,
    call: Mapping[str, Any] | None = None,
    calibrate_on: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """The fastest setting of :func:`asyncdiff.parallelize` that keeps a wanted fidelity.

    Draws ``prompts`` plainly, then with one setting after another; fidelity is that of the
    pictures to the plain ones from the same noise. Of each family of settings (components, stride,
    schedule) the fewest exact steps that are enough are found by bisection, which takes fidelity to
    grow with them. Families that cannot be faster than what was found are not tried.

    Args:
        pipe: a diffusers pipeline with a denoiser that :func:`parallelize` can split.
        prompts: drawn as one batch.
        psnr_db, max_lpips: keep at least this mean PSNR, in dB, or at most this mean LPIPS; one.
        devices: where ranks run while this tries; they may share one: the pictures are the same.
            Default: all GPUs in turn, else the CPU.
        ranks: how many devices the setting may use; default: the different ones of ``devices``,
            but at least two.
        num_inference_steps, seed: of the generations.
        call: further arguments of the pipeline's call.
        calibrate_on: other prompts than ``prompts``, eight at least, sixteen better: waves are
            calibrated on them (``Handle.calibrate``), each setting for itself, which takes three
            generations of these; where a calibration does not win there, the default is taken.
        progress: called with (what, done, of how many).

    Raises TuneError, which names the best setting tried, where none is good enough; InputError for
    targets that make no sense, MetricError where LPIPS cannot be computed here.
    """
    where, ranks = check_request(
        prompts, psnr_db=psnr_db, max_lpips=max_lpips, devices=devices, ranks=ranks,
        calibrate_on=calibrate_on,
    )  # fmt: skip
    good, learned = _target(psnr_db, max_lpips)
    steps = num_inference_steps

    def arguments(texts: Sequence[str], first_seed: int) -> dict[str, Any]:
        noise = [torch.Generator("cpu").manual_seed(first_seed + i) for i in range(len(texts))]
        own = {"prompt": list(texts), "generator": noise, **dict(call or {})}
        return own | {"num_inference_steps": steps, "output_type": "pt"}

    def draw(what: str) -> torch.Tensor:
        with torch.no_grad(), _steps(pipe, what, steps) as watched:
            images: torch.Tensor = pipe(**arguments(prompts, seed), **watched).images
        return images.float().cpu()

    def attempt(settings: dict[str, Any], speedup: float) -> Trial:
        devices = [where[r % len(where)] for r in range(_ranks(settings))]
        name = "{schedule} N={components} S={stride} w={warmup} tail={exact_tail}".format(
            **settings
        )
        # The split is that which the user will get: it decides what is stale.
        with parallelize(pipe, devices, compile=False, **settings) as handle:
            calibration = None
            if calibrate_on is not None and settings["schedule"] == "wavefront":
                found = handle.calibrate(**arguments(calibrate_on, seed + len(prompts)))
                calibration = found if found.taken else None
            close = fidelity(draw(f"trying {name}"), reference, prompts, learned)
        return Trial(settings, speedup, close, calibration)

    tried: list[Trial] = []
    best: Trial | None = None
    with within(progress or (lambda what, done, total: None)):
        reference = draw("drawing with the plain pipeline")
        families = _families(pipe, where, ranks, steps, call or {})
        for number, family in enumerate(families):
            tell("families of settings", number, len(families))
            low, high = 0, len(family)
            while low < high:
                middle = (low + high) // 2
                settings, speedup = family[middle]
                if best is not None and speedup <= best.speedup:
                    high = middle  # too slow to be of use, and with more exact steps slower still
                    continue
                tried.append(attempt(settings, speedup))
                if good(tried[-1].fidelity):
                    best, high = tried[-1], middle
                else:
                    low = middle + 1
        tell("families of settings", len(families), len(families))
    if not tried:
        raise InputError(f"{steps} steps are too few to leave out anything")
    if best is None:
        closest = max(tried, key=lambda t: t.fidelity.psnr_db)
        wanted = f"{psnr_db} dB" if psnr_db is not None else f"LPIPS {max_lpips}"
        raise TuneError(
            f"no setting on {ranks} devices keeps {wanted}; the best of {len(tried)} tried is "
            f"{closest}. Ask for less, or take more steps or fewer devices"
        )
    return Tuned(best, tried)


def check_request(
    prompts: Sequence[str],
    *,
    psnr_db: float | None = None,
    max_lpips: float | None = None,
    devices: Devices = None,
    ranks: int | None = None,
    calibrate_on: Sequence[str] | None = None,
) -> tuple[list[torch.device], int]:
    """Where :func:`tune` would try, and how many ranks it would use; raises what it raises for
    arguments that make no sense, before any work."""
    _target(psnr_db, max_lpips)
    if not prompts:
        raise InputError("tune() needs prompts: those that you care for")
    where = resolve(devices, len(devices) if devices is not None else 2)
    ranks = max(2, len(set(where))) if ranks is None else ranks
    if ranks < 2:
        raise InputError(f"ranks={ranks}: asynchronous denoising takes at least two devices")
    if calibrate_on is not None:
        check_pictures(calibrate_on)
        if set(calibrate_on) & set(prompts):
            raise InputError(
                "calibrate_on and prompts share some: judge by others than were fitted"
            )
    return where, ranks


def _target(
    psnr_db: float | None, max_lpips: float | None
) -> tuple[Callable[[Fidelity], bool], dict[str, Learned]]:
    if (psnr_db is None) == (max_lpips is None):
        raise InputError("say what to keep: psnr_db or max_lpips, one of them")
    if psnr_db is not None:
        if not psnr_db > 0 or math.isinf(psnr_db):
            raise InputError(f"psnr_db={psnr_db}: a PSNR in dB, such as 30")
        return lambda f: f.psnr_db >= psnr_db, {}
    assert max_lpips is not None
    if not max_lpips > 0:
        raise InputError(f"max_lpips={max_lpips}: a distance above 0, such as 0.1")
    return lambda f: f.learned["lpips"] <= max_lpips, {"lpips": lpips()}


#: Settings that differ in their exact steps only, fewest first: arguments of ``parallelize``, and
#: the speed-up that is predicted.
Family = list[tuple[dict[str, Any], float]]


def _families(
    pipe: Any, where: Sequence[torch.device], ranks: int, steps: int, call: Mapping[str, Any]
) -> list[Family]:
    """All settings that ``ranks`` devices allow, the fastest family first. The denoiser is exported
    and timed once, on the first device."""
    module = find_denoiser(pipe)
    scale = getattr(pipe, "vae_scale_factor", 1)
    size: dict[str, Any] = {"height": call.get("height"), "width": call.get("width")}
    parsed = parse(module, (), example_inputs(module, scale=scale, **size))
    captured = capture(module, parsed)
    costs = measure(captured, parsed.tensors, where[0])
    links = links_between(where)
    shapes: list[dict[str, Any]] = [
        {"components": n, "stride": s, "schedule": schedule}
        for schedule in ASYNCHRONOUS
        for n in range(2, ranks + 1)
        for s in (1, 2)
        if rank_count(n, s, schedule) <= ranks
    ]
    found = []
    for number, shape in enumerate(shapes):
        tell("predicting speeds", number, len(shapes))
        copies = _ranks(shape) - shape["components"] + 1
        parts = partition(captured, shape["components"], "auto", costs=costs, copies=copies)
        timing = Timing.from_report(parts.report().to_dict(), **links)
        family = []
        for warmup, tail in ((w, tail) for w, tail in ENDS if w + tail < steps):
            settings = {**shape, "warmup": warmup, "exact_tail": tail}
            plan = build(steps=steps, exchanges=parts.exchanges, **settings)
            family.append((settings, predict(plan, timing).speedup))
        found.append(family)
    tell("predicting speeds", len(shapes), len(shapes))
    return sorted(found, key=lambda family: -max((s for _, s in family), default=0.0))


def _ranks(settings: Mapping[str, Any]) -> int:
    return rank_count(settings["components"], settings["stride"], settings["schedule"])


@contextlib.contextmanager
def _steps(pipe: Any, what: str, steps: int) -> Iterator[dict[str, Any]]:
    """Tells how many steps a call of the pipeline has taken, where it says so itself: yields what
    to pass to it."""
    done = 0

    def stepped(_pipe: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        nonlocal done
        done = min(done + 1, steps)
        tell(what, done, steps + 1)  # the picture is made after the last step
        return values

    tell(what, 0, steps + 1)
    accepted = inspect.signature(pipe.__call__).parameters
    yield {"callback_on_step_end": stepped} if "callback_on_step_end" in accepted else {}
    tell(what, steps + 1, steps + 1)
