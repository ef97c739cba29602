"""From a diffusers scheduler's timesteps to what a pipeline passes to its denoiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .errors import SchedulerError

#: What pipelines make of a scheduler's timestep t: SD and SVD pass it on, FLUX passes t/1000,
#: others count from the other end (n is the number of training timesteps).
_MAPPINGS: tuple[tuple[str, Callable[[torch.Tensor, float], torch.Tensor]], ...] = (
    ("t", lambda t, n: t),
    ("t / n", lambda t, n: t / n),
    ("1 - t / n", lambda t, n: 1 - t / n),
    ("n - t", lambda t, n: n - t),
)
#: Pipelines that pass such times also turn a flow prediction's sign (Lumina 2, Z-Image).
_BACKWARDS = ("1 - t / n", "n - t")


def check_scheduler(scheduler: Any) -> torch.Tensor:
    """The scheduler's timesteps; raises SchedulerError if it cannot be served."""
    name = type(scheduler).__name__
    order = getattr(scheduler, "order", 1)
    if order != 1:
        raise SchedulerError(
            f"{name} calls the denoiser {order} times a step (order={order}): asynchronous "
            "denoising serves schedulers that call it once, such as DDIM, Euler, "
            "DPMSolverMultistep or UniPC"
        )
    timesteps = getattr(scheduler, "timesteps", None)
    if not isinstance(timesteps, torch.Tensor) or timesteps.dim() != 1 or len(timesteps) == 0:
        raise SchedulerError(
            f"{name} has no list of timesteps: call scheduler.set_timesteps() before the denoiser"
        )
    return timesteps


class Times:
    """The timesteps that remain from the first call on, as the denoiser's own argument values.

    ``first`` is the timestep argument of the first call. An image-to-image pipeline starts in the
    middle of the schedule: the first call says where. Raises SchedulerError where the argument is
    not a known function of the timesteps.
    """

    def __init__(self, scheduler: Any, first: torch.Tensor) -> None:
        self.source = check_scheduler(scheduler)
        train = float(getattr(scheduler.config, "num_train_timesteps", 1000) or 1000)
        schedule = self.source.detach().double().cpu()
        value = float(first.detach().double().reshape(-1)[0])
        errors = []
        for name, mapping in _MAPPINGS:
            # In the argument's own precision: half precision moves a timestep by up to 0.4 %.
            values = mapping(schedule, train).to(first.dtype).double()
            distance = (values - value).abs()
            index = int(distance.argmin())
            scale = float(values.abs().max()) or 1.0
            errors.append((float(distance[index]) / scale, name, index, values))
        error, self.mapping, self.start, values = min(errors, key=lambda e: e[0])
        if error > 1e-5 + 2 * torch.finfo(first.dtype).eps if first.is_floating_point() else error:
            raise SchedulerError(
                f"the denoiser was called with timestep {value:g}, which is not made from the "
                f"timesteps of {type(scheduler).__name__} in a way that is known "
                f"({', '.join(n for n, _ in _MAPPINGS)}): use asyncdiff.AsyncDenoiser and pass "
                "the denoiser's timesteps to its generation()"
            )
        #: whether the denoiser counts time from the other end than the scheduler
        self.backwards = self.mapping in _BACKWARDS
        self.values = values[self.start :].to(device=first.device, dtype=first.dtype)
        own = self.source[self.start :]
        if self.mapping == "t" and (own.device, own.dtype) == (first.device, first.dtype):
            # Calls with views of the scheduler's own timesteps are then known to have these.
            self.values = own
        self._exact = values[self.start :]
        self._offset = self.source.storage_offset()
        self._pending: list[tuple[int, torch.Tensor, Any]] = []

    def check(self, step: int, value: torch.Tensor) -> None:
        """Raise SchedulerError unless the ``step``-th call has that step's timestep.

        Values on a GPU are looked at later, when they have arrived anyway: see :meth:`finish`.
        """
        if value.untyped_storage().data_ptr() == self.source.untyped_storage().data_ptr():
            index = value.storage_offset() - self._offset
            # A schedule may name a timestep twice; the position says which of them this is.
            if index != self.start + step:
                self._refuse(step, f"timestep number {index} of the schedule")
            return
        if value.device.type == "cpu":
            self._compare(step, value)
            return
        arrived = torch.empty(1, dtype=value.dtype, pin_memory=True)
        arrived.copy_(value.detach().reshape(-1)[:1], non_blocking=True)
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

    def _compare(self, step: int, value: torch.Tensor) -> None:
        seen = float(value.reshape(-1)[0].double())
        nearest = float((self._exact - seen).abs().min())
        mine = float((self._exact[step] - seen).abs())
        if mine > nearest:
            self._refuse(step, f"timestep {seen:g}")

    def _refuse(self, step: int, what: str) -> None:
        raise SchedulerError(
            f"call {step} of this generation came with {what}, where timestep "
            f"{float(self._exact[step]):g} was due: the pipeline calls the denoiser more or less "
            "often than once a step (guidance in two calls, or a scheduler of higher order?), "
            "which asynchronous denoising cannot serve"
        )
