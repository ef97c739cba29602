"""From a diffusers scheduler's timesteps to what a pipeline passes to its denoiser."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from ...errors import SchedulerError
from ...sampling.scheduler import check_scheduler
from .readings import ANOTHER, Reading, by_order, moving, readings


class TimestepTracker:
    """The timesteps that remain from the first call on, as the denoiser's own argument values.

    ``first`` is the timestep argument of the first call. An image-to-image pipeline starts in the
    middle of the schedule: the first call says where. ``steps`` is how many there will be, where
    the pipeline knows (one that leaves the end to another stops before it); None: all that are
    left. ``like`` is the tracker of an earlier generation: where a first call can be read in
    several ways, as that one's turned out. Raises SchedulerError where the argument is not a known
    function of the timesteps, unless calls are known to be ``ordered``: then each has its own.
    """

    def __init__(
        self,
        scheduler: Any,
        first: torch.Tensor,
        steps: int | None = None,
        like: TimestepTracker | None = None,
        *,
        ordered: bool = False,
    ) -> None:
        self.source = check_scheduler(scheduler)
        self._storage = self.source.untyped_storage().data_ptr()
        self._offset, self._stride = int(self.source.storage_offset()), self.source.stride(0) or 1
        index = self._index(first)
        if index is not None:
            # Where it lies tells more than its value, which a schedule may hold twice.
            exact = self.source.detach().double().cpu()
            self._readings = [Reading("t", 0, index, self.source, exact)]
        else:
            way = None if like is None else like.reading.way
            try:
                self._readings = readings(scheduler, self.source, first, steps, way)
            except SchedulerError:
                if not ordered:
                    raise
                self._readings = [by_order(self.source, first, steps)]
        self._limited = bool(steps)
        self._follow(steps, first)

    def end_before(self, bound: float, now: torch.Tensor) -> None:
        """Leave the timesteps below ``bound`` to another denoiser. ``now``: the first call's."""
        mine = self.source[self.start : self.start + len(self.values)]
        count = int((mine >= bound).sum())
        if 0 < count < len(mine):
            self._limited = True
            self._follow(count, now)

    @property
    def reading(self) -> Reading:
        """How the first call is read."""
        return self._readings[0]

    def _follow(self, steps: int | None, now: torch.Tensor) -> None:
        """Take the likeliest reading, for so many steps, the first of which has ``now``."""
        #: where in the schedule these timesteps begin
        self.start = self.reading.start
        mine = slice(self.start, self.start + steps if steps else None)
        self.values = self.reading.values[mine].to(now.device)
        own = self.source[mine]
        if self.reading.mapping == "t" and (own.device, own.dtype) == (now.device, now.dtype):
            # Calls with views of the scheduler's own timesteps are then known to have these.
            self.values = own
        self._exact = self.reading.exact[mine]
        #: whether all calls so far had the very bits of ``values``
        self._same = bool((now == self.values[0]).all())
        self._tell(0)
        self._pending: list[tuple[int, torch.Tensor, Any]] = []

    def _tell(self, step: int) -> None:
        #: the first step after ``step`` that tells how the first call should have been read
        self.telling = next(
            (
                k
                for k in range(step + 1, len(self._exact))
                if self.reading.known
                and {r.at(k) for r in self._readings} - {self.reading.at(k), None}
            ),
            None,
        )

    def after(self, step: int) -> TimestepTracker:
        """Those from the ``step``-th call on. Call :meth:`finish` first."""
        rest = copy.copy(self)
        rest._readings = [reading.after(step) for reading in self._readings]
        rest.start += step
        rest.values, rest._exact = self.values[step:], self._exact[step:]
        rest._tell(-1)
        rest._pending = []
        return rest

    def corrected(self, step: int, value: torch.Tensor) -> TimestepTracker | None:
        """Those from the ``step``-th call on, where it shows that the first one was to be read in
        another way; None where it was read well. Call it if ``step`` is :attr:`telling`.

        On a GPU the host waits for the call's timestep.
        """
        seen, before = float(moving(value.detach().double())), self.reading
        errors = [(abs(at - seen), r) for r in self._readings if (at := r.at(step)) is not None]
        least = min(error for error, _ in errors)
        nearest = [r for error, r in errors if error == least]
        self._readings = sorted(nearest, key=lambda r: r is not before)
        # Another rounding is an ulp, of no weight but for the next generation.
        self._same = self._same and least == 0 and self.reading is before
        if (self.reading.mapping, self.reading.start) == (before.mapping, before.start):
            self._tell(step)
            return None
        self.finish()
        rest = self.after(step)
        rest._follow(len(self.values) - step if self._limited else None, value)
        return rest

    def _index(self, value: torch.Tensor) -> int | None:
        """Which of the scheduler's own timesteps a call's is, or several views of it, if any."""
        if value.untyped_storage().data_ptr() != self._storage:
            return None
        index, between = divmod(int(value.storage_offset()) - self._offset, self._stride)
        return None if between or not 0 <= index < len(self.source) else index

    def place(self, value: torch.Tensor) -> int | None:
        """Which of the schedule's timesteps a call's is, if where it lies tells."""
        return self._index(value)

    def has(self, step: int, value: torch.Tensor) -> bool:
        """Whether a call with this timestep is of the ``step``-th step rather than of the next one.
        The host waits for the value."""
        now = float(moving(value.detach().double()))
        here = [abs(at - now) for r in self._readings if (at := r.at(step)) is not None]
        there = [abs(at - now) for r in self._readings if (at := r.at(step + 1)) is not None]
        return min(here, default=math.inf) < min(there, default=math.inf)

    def known(self, step: int, value: torch.Tensor) -> torch.Tensor:
        """The ``step``-th call's timestep as a view of ``values``, where it is known to be that; so
        a denoiser that knows these need not look at it. Else ``value`` itself.

        On a GPU the host does not look; :meth:`finish` does.
        """
        if self._index(value) is not None:
            return value
        if self._same and value.device.type == "cpu":
            self._same = bool((value == self.values[step]).all())
        return self.values[step].expand(value.shape) if self._same else value

    def check(self, step: int, value: torch.Tensor) -> None:
        """Raise SchedulerError unless the ``step``-th call has that step's timestep.

        Values on a GPU are looked at later, when they have arrived anyway: see :meth:`finish`.
        """
        index = self._index(value)
        if not self.reading.known:
            return
        if index is not None:
            # A schedule may name a timestep twice; the position says which of them this is.
            if index != self.start + step:
                self._refuse(step, f"timestep number {index} of the schedule")
            return
        if value.device.type == "cpu":
            self._compare(step, value.detach().reshape(-1))
            return
        seen = value.detach().reshape(-1)
        arrived = torch.empty(seen.shape, dtype=value.dtype, pin_memory=True)
        arrived.copy_(seen, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(value.device))
        self._pending.append((step, arrived, event))
        while self._pending and self._pending[0][2].query():
            self._compare(*self._pending.pop(0)[:2])

    def finish(self) -> None:
        """Look at what has not been compared yet. Call once the devices are idle."""
        for step, value, event in self._pending:
            event.synchronize()
            self._compare(step, value)
        self._pending.clear()

    def _compare(self, step: int, seen: torch.Tensor) -> None:
        seen, due = seen.double(), self._exact[step]
        own = moving(seen)
        nearest = float((self._exact - own).abs().min())
        if float((due - own).abs()) > nearest:
            self._refuse(step, f"timestep {float(own):g}")
        if self._same and not (seen == due).all():
            if not (seen == seen[0]).all():  # those of some samples were taken for what was due
                raise SchedulerError(
                    f"call {step} of this generation came with a timestep for each sample, calls "
                    "before it with one for all: use asyncdiff.AsyncDenoiser for such pipelines"
                )
            self._same = False  # rounded in another way: an ulp

    def _refuse(self, step: int, what: str) -> None:
        raise SchedulerError(
            f"call {step} of this generation came with {what}, where timestep "
            f"{float(self._exact[step]):g} was due: the denoiser is called more or less often than "
            "once for each of the scheduler's timesteps. Several calls a step are told apart while "
            "a pipeline runs; in a loop of your own use asyncdiff.AsyncDenoiser and its "
            f"generation(timesteps, branches=…); {ANOTHER}"
        )
