"""Which branch of a sampler's step each call of the denoiser is, and when a step begins.

Many pipelines guide in several calls a step, one for each condition. Diffusers names most of them
(``cache_context``); else what a call is given tells, and at last the order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...generation.generation import Generation
from ...graph.signature import Call, Role
from .step_count import is_counted, steps_of
from .timesteps import TimestepTracker


@dataclass(eq=False)
class CallBranch:
    """A branch: its last ``call``, and its ``generation``, of the timesteps ``times``, which began
    at the sampler's step ``start``. ``step`` is the one that it was called in last."""

    index: int
    name: str | None
    times: TimestepTracker | None = None
    generation: Generation | None = None
    start: int = 0
    step: int = -1
    #: rests of a generation that followed each other after one step
    short: int = 0
    #: held, so that no other tensors lie where those of the call do
    call: Call | None = None

    @property
    def active(self) -> bool:
        """Whether its generation has steps left."""
        return self.generation is not None and not self.generation.done

    def likeness(self, call: Call) -> int:
        """How much a call looks like the last one: 2 for the same conditioning, 1 for the same
        shapes and options, else 0."""
        if self.call is None or call.signature != self.call.signature:
            return 0
        return 1 + (_conditioning(call) == _conditioning(self.call))


class BranchFinder:
    """Tells branches apart, and steps, in one run of a sampler. ``stepping``: the classes of
    schedulers that were seen to take steps in runs before this one, and are in this one."""

    def __init__(self, stepping: set[type]) -> None:
        self._stepping = stepping
        self.all: list[CallBranch] = []
        #: index of the sampler's step, from the first call on
        self.step = 0
        self._last: tuple[torch.Tensor, int | None] | None = None
        self._scheduler: Any = None
        self._count = 0
        self._counts = False

    def find(
        self, call: Call, time: torch.Tensor, name: str | None, scheduler: Any, *, alone: bool
    ) -> CallBranch:
        """The branch of a call; a new one, without ``times`` yet, where it is none of those known.
        ``name``: what the caller calls it. ``alone``: each call is a step of its own."""
        count = steps_of(scheduler)
        if scheduler is self._scheduler and count != self._count:
            self._counts = True
            self._stepping.add(type(scheduler))
            self.step += 1
        elif self.all and (alone or scheduler is not self._scheduler or self._is_next(time)):
            self.step += 1
        self._last = time, None if time.is_inference() else time._version
        self._scheduler, self._count = scheduler, count
        due = [b for b in self.all if b.step != self.step and b.name == name]
        if len(due) > 1:
            due.sort(key=lambda b: (-b.likeness(call), b.index))
        elif not due:
            due = [CallBranch(len(self.all), name)]
            self.all += due
        due[0].step, due[0].call = self.step, call
        return due[0]

    def returned(self) -> None:
        """The call was served. What took steps meanwhile, to see what the scheduler makes of
        predictions, was no step of the caller's."""
        self._count = steps_of(self._scheduler)

    def _is_next(self, time: torch.Tensor) -> bool:
        """Whether a call with this timestep belongs to another step than the one before it, where
        the scheduler has not been seen to take one."""
        assert self._last is not None
        last, version = self._last
        times = self.all[0].times
        if times is None:  # of a first call that failed
            return True
        here, there = times.place(time), times.place(last)
        if here is not None and there is not None:
            return here != there
        if self._counts or (last is time and version is not None and version == time._version):
            return False
        if type(self._scheduler) in self._stepping and is_counted(self._scheduler):
            return False
        # In the first step of a scheduler that may not be asked for steps. On a GPU the host waits,
        # for the result of the call before this one.
        if not times.reading.known:
            return not torch.equal(time, last)
        return not times.has(self.step - self.all[0].start, time)


def _conditioning(call: Call) -> list[tuple[Any, ...]]:
    """Where the conditioning of a call lies."""
    tensors = (call.tensors[i] for i in call.indices(Role.CONDITIONING))
    return [(t.data_ptr(), t.shape, t.stride()) for t in tensors]
