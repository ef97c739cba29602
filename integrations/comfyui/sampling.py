"""A sampler's run: which step and which branch each call of the denoiser belongs to."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from asyncdiff import AsyncDenoiser
from asyncdiff.errors import BatchError, MemoryLimitError, TokensError
from asyncdiff.generation.generation import Generation
from asyncdiff.generation.spec import GenerationSpec
from asyncdiff.graph.signature import Call, Role
from asyncdiff.integrations.auto import AutoSettings
from asyncdiff.sampling.clean_image import CleanImage
from asyncdiff.schedule.branch import Branch

from .linear import clean_images, served
from .samplers import ONCE, name_of, times_of

log = logging.getLogger("asyncdiff")


@dataclass
class _Way:
    """One of the denoiser's calls in an evaluation: its branch, and the generation under way, which
    began with step ``start``."""

    index: int
    start: int = 0
    generation: Generation | None = None


class Sampling:
    """Serves the calls of one run at ``sigmas`` (a tensor, the last of them not evaluated).

    As long as the sampler evaluates at one announced sigma after another, the run is a generation
    for each branch. Else, from there on, each evaluation is a generation of one exact step.
    ``auto`` picks the settings of each generation (None: they stay what they are).
    """

    def __init__(
        self,
        denoiser: AsyncDenoiser,
        auto: AutoSettings | None,
        model_sampling: Any,
        sigmas: torch.Tensor,
        sampler: Any,
    ) -> None:
        self._denoiser, self._auto = denoiser, auto
        with torch.inference_mode(False):  # writes to it are counted
            given = sigmas[:-1].detach().clone()
            self._times = times_of(model_sampling, given).clone()
        self._sigmas: list[float] = given.tolist()
        self._step = -1
        #: by what tells conditions apart, and how often these were called in the evaluation
        self._ways: dict[Any, _Way] = {}
        self._calls: dict[Any, int] = {}
        #: of the evaluation, as far as they were announced
        self.conditions = 1
        #: of the denoiser, so far
        self.calls = 0
        self._exact = False
        #: of the whole run, which waves have to know, or why they are not known
        self._clean: CleanImage | str = "no waves"
        name, schedule = name_of(sampler), denoiser.config.schedule
        if name not in ONCE and (auto is not None or schedule != "sequence"):
            self.be_exact(f"{name} evaluates more than once in a step, or is not known")
        elif auto is not None:
            self._clean = served(model_sampling, sigmas, sampler)
        elif schedule == "wavefront":
            self._clean = clean_images(model_sampling, sigmas, sampler)

    def evaluation(self, sigma: torch.Tensor) -> None:
        """The sampler evaluates at ``sigma``, of shape (batch,)."""
        self._step += 1
        self._calls.clear()
        if self._exact:
            return
        values = set(sigma.reshape(-1).tolist())
        if self._step >= len(self._sigmas) or values != {self._sigmas[self._step]}:
            self.be_exact("the sampler evaluates at other noise levels than it announced")

    def call(self, options: dict[str, Any], arguments: dict[str, Any]) -> Any:
        """What the denoiser returns for ``arguments``, by name. ``options``: its transformer
        options, which say which conditions these are."""
        denoiser = self._denoiser
        self.calls += 1
        which = tuple(options.get("cond_or_uncond", ())), tuple(options.get("uuids", ()))
        occurrence = self._calls.get(which, 0)
        self._calls[which] = occurrence + 1
        way = self._ways.setdefault((which, occurrence), _Way(len(self._ways)))
        call = denoiser.parse((), arguments)
        time = call.tensors[call.indices(Role.TIMESTEP)[0]]
        several = way.index > 0 or self.conditions > max(len(which[0]), 1)
        branch = Branch(way.index, max(len(self._ways), 2 if several else 1))
        while True:
            try:
                result = self._result(way, branch, call, time)
                return result.to(time.device)  # from the first of the devices to the sampler's
            except (BatchError, TokensError, MemoryLimitError) as e:
                if self._auto is None or not self._auto.picks_again(call, e):
                    raise
            with torch.inference_mode(False):
                denoiser.stop()
            for other in self._ways.values():  # of a step, too, the rest begins
                other.generation = None

    def _result(self, way: _Way, branch: Branch, call: Call, time: torch.Tensor) -> Any:
        """What the denoiser returns for a call with this timestep."""
        if not self._exact and self._is_new(way, call):
            self._begin(way, branch, call, time)
        if self._exact:
            self._begin_one(way, branch, call, time)
        else:
            told = self._times[self._step].expand(time.shape)
            if (told.dtype, told.device) == (time.dtype, time.device):
                call = call.replacing(call.indices(Role.TIMESTEP)[0], told)
        return self._denoiser.call(call, way.index)

    def be_exact(self, why: str) -> None:
        """Run all that is left exactly, evaluation by evaluation; ComfyUI's log says why."""
        log.warning("AsyncDiff parallel: every step is run exactly: %s", why)
        self._exact = True
        self.stop()

    def settle(self) -> None:
        """Wait for what is still to do, and raise what went wrong."""
        with torch.inference_mode(False):
            self._denoiser.settle()

    def stop(self) -> None:
        """Give up what is unfinished."""
        with torch.inference_mode(False):
            self._denoiser.stop()
        self._ways.clear()

    def _is_new(self, way: _Way, call: Call) -> bool:
        """Whether a call belongs to no generation under way, or to one that it does not fit."""
        generation = way.generation
        if generation is None or generation.next_step != self._step - way.start:
            return True
        return not self._denoiser.fits(call, options=False, branch=way.index)

    def _begin(self, way: _Way, branch: Branch, call: Call, time: torch.Tensor) -> None:
        """Begin a generation of the steps that are left."""
        expected = self._times[self._step].to(time.dtype).to(time.device)
        if not bool((time == expected).all()):
            self.be_exact("the denoiser's times do not follow from the noise levels alone")
            return
        left = len(self._sigmas) - self._step
        clean = self._clean
        if not isinstance(clean, str):
            clean = clean.of_steps(self._step, left)
        with torch.inference_mode(False):
            self._pick(way, branch, call, left, clean)
            spec = GenerationSpec.of(self._denoiser.config, self._times[self._step :], shorten=True)
            known = None if isinstance(clean, str) or spec.all_exact else clean
            way.start = self._step
            way.generation = self._denoiser.start(spec, known, branch=branch)

    def _begin_one(self, way: _Way, branch: Branch, call: Call, time: torch.Tensor) -> None:
        """Begin a generation of this step alone, which is exact."""
        with torch.inference_mode(False):
            self._pick(way, branch, call, 1, "the sampler's steps are not known")
            only = time.reshape(-1)[:1].clone()
            spec = GenerationSpec.of(self._denoiser.config, only, shorten=True)
            way.generation = self._denoiser.start(spec, branch=branch)

    def _pick(
        self, way: _Way, branch: Branch, call: Call, steps: int, clean: CleanImage | str
    ) -> None:
        """Have the denoiser take the settings for a generation of so many steps, unless another
        branch is in the middle of one."""
        others = (w.generation for w in self._ways.values() if w is not way)
        if self._auto is not None and not any(g is not None and not g.finished for g in others):
            self._auto.settle(self._denoiser, call, steps, clean, branch.count)
