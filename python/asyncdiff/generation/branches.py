"""The generations that are under way beside each other: one for each branch of a sampler's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..graph.signature import Call, Role
from ..runtime.cfg_parallel import Groups
from ..runtime.engine import Engine
from ..runtime.step import Caller
from .generation import Generation
from .report import GenerationReport, of_branches

_Mark = tuple[Any, ...]


class Branches:
    """Generations by the index of their branch. A step of the sampler takes a step of each that is
    called in it; the host waits for none before all have had their last one.

    ``report`` is given what they did, once they are finished.
    """

    def __init__(self, report: Callable[[GenerationReport], None]) -> None:
        self._report = report
        self._all: dict[int, Generation] = {}
        self._earlier: tuple[list[torch.Tensor], list[_Mark], Caller] | None = None

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

    def engines(self, index: int) -> list[Engine | Groups]:
        """Those that other branches than this one use."""
        return [e for i, g in self._all.items() if i != index for e in g.engines]

    def step(self, index: int, call: Call) -> Any:
        """The denoiser's result for the next step of a branch. Where it fails, all of them end."""
        generation = self._all[index]
        ready = self._ready(call) if len(self._all) > 1 else None
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

    def stop(self) -> None:
        """Give up what is unfinished, and forget all of them."""
        self._earlier = None
        while self._all:
            self._all.popitem()[1].abandon()

    def _ready(self, call: Call) -> Caller | None:
        """Since when what moves from step to step is ready, on the caller's stream: where an
        earlier call in the step had the same, that one need not end before this one begins."""
        moving = [
            call.tensors[i] for role in (Role.LATENTS, Role.TIMESTEP) for i in call.indices(role)
        ]
        device = moving[0].device
        if device.type != "cuda" or any(t.is_inference() for t in moving):
            return None
        marks = [(t.data_ptr(), t._version, t.dtype, t.shape, t.stride()) for t in moving]
        if self._earlier is not None:
            tensors, then, caller = self._earlier
            untouched = [t._version for t in tensors] == [mark[1] for mark in then]
            if marks == then and untouched and caller.stream == torch.cuda.current_stream(device):
                return caller
        self._earlier = moving, marks, Caller(device)
        return self._earlier[2]
