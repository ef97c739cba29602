"""From a diffusers scheduler's timesteps to what a pipeline passes to its denoiser."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from ...errors import SchedulerError
from ...sampling.scheduler import check_scheduler

_Mapping = Callable[[torch.Tensor, float], torch.Tensor]
#: What pipelines make of a scheduler's timestep t: SD and SVD pass it on, FLUX passes t/1000,
#: others count from the other end (n is the number of training timesteps).
_MAPPINGS: tuple[tuple[str, _Mapping], ...] = (
    ("t", lambda t, n: t),
    ("t / n", lambda t, n: t / n),
    ("1 - t / n", lambda t, n: 1 - t / n),
    ("n - t", lambda t, n: n - t),
)
#: Pipelines that pass such times also turn a flow prediction's sign (Lumina 2, Z-Image).
_BACKWARDS = ("1 - t / n", "n - t")

_ANOTHER = "or another pipeline calls it, with a scheduler of its own (parallelise that one)"


#: In which order they go to the denoiser's precision. To half of it that makes a difference.
_ORDERS: tuple[Callable[[_Mapping, torch.Tensor, float, torch.dtype], torch.Tensor], ...] = (
    lambda mapping, t, n, dtype: mapping(t.to(dtype), n).to(dtype),
    lambda mapping, t, n, dtype: mapping(t, n).to(dtype),
)


def is_mixed(timestep: torch.Tensor) -> bool:
    """Whether a call has several timesteps at once, for the parts of its input. A host that asks a
    GPU waits for it."""
    return timestep.numel() > 1 and not bool((timestep == timestep.reshape(-1)[0]).all())


def _moving(timestep: torch.Tensor) -> torch.Tensor:
    """The timestep of the parts that the sampler moves: where others are given as they are (the
    first frame of a video), theirs is 0."""
    flat = timestep.reshape(-1)
    others = flat[flat != 0]
    return others[0] if len(others) else flat[0]


class TimestepTracker:
    """The timesteps that remain from the first call on, as the denoiser's own argument values.

    ``first`` is the timestep argument of the first call. An image-to-image pipeline starts in the
    middle of the schedule: the first call says where. ``steps`` is how many there will be, where
    the pipeline knows (one that leaves the end to another stops before it); None: all that are
    left. Raises SchedulerError where the argument is not a known function of the timesteps.
    """

    def __init__(self, scheduler: Any, first: torch.Tensor, steps: int | None = None) -> None:
        self.source = check_scheduler(scheduler)
        self._offset = self.source.storage_offset()
        rivals: list[torch.Tensor] = []
        if self._is_view(first):
            # Where it lies tells more than its value, which a schedule may hold twice.
            self.mapping, self.start = "t", int(first.storage_offset() - self._offset)
            values, exact = self.source, self.source.detach().double().cpu()
        else:
            self.mapping, self.start, values, exact, rivals = self._found(scheduler, first)
        #: whether the denoiser counts time from the other end than the scheduler
        self.backwards = self.mapping in _BACKWARDS
        mine = slice(self.start, None if not steps else self.start + steps)
        self.values = values[mine].to(first.device)
        own = self.source[mine]
        if self.mapping == "t" and (own.device, own.dtype) == (first.device, first.dtype):
            # Calls with views of the scheduler's own timesteps are then known to have these.
            self.values = own
        self._exact = exact[mine]
        #: whether all calls so far had the very bits of ``values``
        self._same = bool((first == self.values[0]).all())
        #: the first step that tells ``values`` from what else the first call may have come from
        self._telling = min(
            (int(k) for r in rivals for k in (r[mine] != self._exact).nonzero()[:1]), default=None
        )
        self._pending: list[tuple[int, torch.Tensor, Any]] = []

    def after(self, step: int) -> TimestepTracker:
        """Those from the ``step``-th call on. Call :meth:`finish` first."""
        rest = copy.copy(self)
        rest.start += step
        rest.values, rest._exact = self.values[step:], self._exact[step:]
        if self._telling is not None:
            rest._telling = self._telling - step if self._telling >= step else None
        rest._pending = []
        return rest

    def _is_view(self, value: torch.Tensor) -> bool:
        """Whether a call's timestep is one of the scheduler's own, or several views of it."""
        return value.untyped_storage().data_ptr() == self.source.untyped_storage().data_ptr()

    def _found(
        self, scheduler: Any, first: torch.Tensor
    ) -> tuple[str, int, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """What is known of the first call by its value: the mapping, the step, all values in the
        call's dtype and in float64, and those of other ways to the same first value."""
        train = float(getattr(scheduler.config, "num_train_timesteps", 1000) or 1000)
        value = float(_moving(first.detach().double()))
        found = []
        for name, mapping in _MAPPINGS:
            for order in _ORDERS:
                # Where and as the pipeline computes them, so that they have the same bits.
                values = order(mapping, self.source.detach(), train, first.dtype)
                exact = values.double().cpu()
                distance = (exact - value).abs()
                index = int(distance.argmin())
                scale = float(exact.abs().max()) or 1.0
                found.append((float(distance[index]) / scale, index, name, values, exact))
        # Most generations begin with the first timestep: 1 may be its t/n, and the last t.
        error, start, name, values, exact = min(found, key=lambda f: (f[0], f[1] > 0))
        if error > 1e-5 + 2 * torch.finfo(first.dtype).eps if first.is_floating_point() else error:
            raise SchedulerError(
                f"the denoiser was called with timestep {value:g}, which is not made from the "
                f"timesteps of {type(scheduler).__name__} in a way that is known "
                f"({', '.join(n for n, _ in _MAPPINGS)}): use asyncdiff.AsyncDenoiser and pass "
                f"the denoiser's timesteps to its generation(); {_ANOTHER}"
            )
        rivals = [f[4] for f in found if f[0] == error == 0 and f[1] == start]
        return name, start, values, exact, rivals

    def known(self, step: int, value: torch.Tensor) -> torch.Tensor:
        """The ``step``-th call's timestep as a view of ``values``, where it is known to be that; so
        a denoiser that knows these need not look at it. Else ``value`` itself.

        On a GPU the host waits for one call at most, the one that tells how the pipeline computes
        its timesteps; :meth:`finish` looks at the others.
        """
        if self._is_view(value):
            return value
        if self._same and (value.device.type == "cpu" or step == self._telling):
            self._same = bool((value == self.values[step]).all())
        return self.values[step].expand(value.shape) if self._same else value

    def check(self, step: int, value: torch.Tensor) -> None:
        """Raise SchedulerError unless the ``step``-th call has that step's timestep.

        Values on a GPU are looked at later, when they have arrived anyway: see :meth:`finish`.
        """
        if self._is_view(value):
            index = value.storage_offset() - self._offset
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
        own = _moving(seen)
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
            f"{float(self._exact[step]):g} was due: the pipeline calls the denoiser more or less "
            "often than once a step (guidance in two calls, or a scheduler of higher order?), "
            f"which asynchronous denoising cannot serve; {_ANOTHER}"
        )
