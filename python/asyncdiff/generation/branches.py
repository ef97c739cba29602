"""The generations that are under way beside each other: one for each branch of a sampler's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..graph.signature import Call
from ..runtime.cfg_parallel import Groups
from ..runtime.engine import Engine
from ..runtime.step import READY_NOW, Ready
from .generation import Generation
from .readiness import Readiness
from .report import GenerationReport, of_branches


class Branches:
    """Generations by the index of their branch. A step of the sampler takes a step of each that is
    called in it; the host waits for none before all have had their last one.

    ``report`` is given what they did, once they are finished.
    """

    def __init__(self, report: Callable[[GenerationReport], None]) -> None:
        self._report = report
        self._all: dict[int, Generation] = {}
        self._readiness = Readiness()
        #: how many there will be: some may begin with their first call
        self._expected = 0
        #: whether :meth:`came`, :meth:`ready` and :meth:`returned` have to know of calls
        self.several = False

    def get(self, index: int) -> Generation | None:
        """The generation of a branch, whether or not it has steps left."""
        return self._all.get(index)

    def next(self) -> int:
        """The branch that is furthest behind: of calls that come in turns, the one that is due."""
        behind = [(g.next_step, index) for index, g in self._all.items() if not g.done]
        return min(behind)[1] if behind else 0

    @property
    def active(self) -> bool:
        """Whether one of them has steps left."""
        return any(not g.done for g in self._all.values())

    def begin(self, generation: Generation) -> None:
        """Take a generation for its branch, giving up the one before."""
        index = generation.branch.index
        old = self._all.pop(index, None)
        if old is not None:
            old.abandon()
        self._all[index] = generation
        self._expected = max(len(self._all), generation.branch.count)
        self.several = self._expected > 1

    def engines(self, index: int) -> list[Engine | Groups]:
        """Those that other branches than this one use."""
        return [e for i, g in self._all.items() if i != index for e in g.engines]

    def known(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        """The values of these timesteps, if another branch has them and the host knows them."""
        return next((k for g in self._all.values() if (k := g.knows(timesteps)) is not None), None)

    def came(self, index: int, call: Call) -> None:
        """A call for a branch comes in; say :meth:`returned` when its result is given away."""
        generation = self._all.get(index)
        if generation is not None:
            self._readiness.came(call, new=generation.next_step == 0)

    def returned(self, call: Call) -> None:
        """The result of a call is given to the caller."""
        begun = sum(g.next_step > 0 for g in self._all.values())
        self._readiness.returned(call, new_next=begun < self._expected)

    def ready(self, call: Call) -> Ready:
        """Since when its inputs have been ready, because those of an earlier call were."""
        return self._readiness.of(call) if self.several else READY_NOW

    def step(self, index: int, call: Call, ready: Ready) -> Any:
        """The denoiser's result for the next step of a branch. Where it fails, all of them end."""
        generation = self._all[index]
        try:
            result = generation.step(call, ready)
            last = (g.steps - g.next_step == 1 for g in self._all.values() if not g.done)
            if generation.done and not any(last):
                self.finish()
        except BaseException:
            self.stop()
            raise
        return result

    def finish(self) -> None:
        """Wait for those that have had all of their steps, and raise what went wrong."""
        done = [g for g in self._all.values() if g.done and not g.finished and g.engine is not None]
        for generation in done:
            generation.finish()
        if done:
            self._report(of_branches([g.report() for g in self._all.values() if g.finished]))

    def stop(self, cause: BaseException | None = None) -> None:
        """Give up what is unfinished, and forget all of them. ``cause``: the error for which this
        process does, of which others are told."""
        self._readiness.forget()
        while self._all:
            self._all.popitem()[1].abandon(cause)
