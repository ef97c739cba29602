"""The first step of a pipeline's generation, for which its denoisers are prepared, and no more."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...errors import AsyncDiffError, InputError
from ...generation.report import by_phase
from .step_count import steps_of

#: One number, or one for each size.
Numbers = int | Sequence[int] | None


@dataclass(frozen=True)
class Preparation:
    """What it took to prepare a pipeline for pictures of one size.

    ``height`` and ``width`` are pixels (None: the pipeline's own), ``batch`` pictures, ``steps``
    those of a generation (None: the pipeline's own). ``seconds`` it took, of which ``phases`` tells
    by phase as :class:`~asyncdiff.generation.report.GenerationReport` does. ``settings``: those
    that pictures of this size are drawn with.
    """

    height: int | None
    width: int | None
    batch: int
    steps: int | None
    seconds: float
    phases: dict[str, float]
    settings: str

    @property
    def size(self) -> str:
        """Width and height, in words."""
        if self.height is None and self.width is None:
            return "the pipeline's own size"
        return f"{self.width or 'own'} x {self.height or 'own'}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        pictures = f", {self.batch} pictures" if self.batch > 1 else ""
        return f"{self.size}{pictures}: {self.seconds:.1f} s{by_phase(self.phases)}"


class Enough(BaseException):
    """Ends a pipeline's run once it has taken the first step. No Exception, which it may catch."""


class Rehearsal:
    """Tells when the denoisers of a pipeline have had their first step, each of ``denoisers``."""

    def __init__(self, denoisers: int) -> None:
        self._denoisers = denoisers
        #: steps that the scheduler had taken when each denoiser had been called first
        self._called: dict[int, int] = {}

    def check(self, scheduler: Any) -> None:
        """A denoiser is about to be called. Raises Enough if it need not."""
        now = steps_of(scheduler)
        if len(self._called) == self._denoisers and now > max(self._called.values()):
            raise Enough

    def called(self, which: Any, scheduler: Any) -> None:
        """A denoiser was called."""
        self._called.setdefault(id(which), steps_of(scheduler))


def each_size(
    height: Numbers, width: Numbers, batch: Numbers
) -> Iterator[tuple[int | None, int | None, int]]:
    """Heights, widths and batches that belong together. Raises InputError where their numbers do
    not match."""
    given = {"height": height, "width": width, "batch": batch}
    lists: dict[str, list[Any]] = {n: list(x) for n, x in given.items() if isinstance(x, Sequence)}
    count = max(map(len, lists.values()), default=1)
    if any(len(x) != count for x in lists.values()) or not count:
        said = ", ".join(f"{len(x)} of {n}" for n, x in lists.items())
        raise InputError(f"prepare() was given {said}: give as many of each, or one for all")
    for name, x in given.items():
        for number in lists.get(name) or ([] if x is None else [x]):
            if not isinstance(number, int) or number < 1:
                raise InputError(f"{name}={number!r}: give a whole number from 1")
    each: list[list[Any]] = [lists.get(n) or [x] * count for n, x in given.items()]
    for h, w, b in zip(*each, strict=True):
        yield h, w, b or 1


def arguments(
    pipe: Any, height: int | None, width: int | None, batch: int, steps: int | None, call: Any
) -> dict[str, Any]:
    """What the pipeline is called with: ``call``, and what there is of the others. Without a prompt
    it is an empty one."""
    accepted = inspect.signature(type(pipe).__call__).parameters
    sizes = {"height": height, "width": width, "num_inference_steps": steps}
    out: dict[str, Any] = {n: x for n, x in sizes.items() if x is not None} | dict(call)
    if "prompt" in accepted and not any(n.startswith("prompt") for n in call):
        out["prompt"] = ""
    if batch > 1 and isinstance(out.get("prompt"), str):
        out["prompt"] = [out["prompt"]] * batch
    if "output_type" in accepted and "output_type" not in call:
        out["output_type"] = "latent"
    if "generator" in accepted and "generator" not in call:  # the user's random numbers stay
        out["generator"] = torch.Generator().manual_seed(0)
    return out


def rehearse(pipe: Any, given: Mapping[str, Any]) -> None:
    """Run the pipeline until it has had enough. Raises InputError where these arguments do not do,
    and what parallelised denoisers raise."""
    try:
        pipe(**given)
    except Enough:
        offloaded = getattr(pipe, "maybe_free_model_hooks", None)  # as at the end of its calls
        if offloaded is not None:
            offloaded()
    except AsyncDiffError:
        raise
    except (TypeError, ValueError, AttributeError) as e:
        raise InputError(
            f"{type(pipe).__name__} does not run with these arguments ({', '.join(given)}): "
            f"{type(e).__name__}: {e}. Give prepare() what it is called with, such as prompt=… or "
            "image=…"
        ) from e
