"""One call for diffusers pipelines: ``handle = asyncdiff.parallelize(pipe)``.

The pipeline and its denoiser stay the objects that they are; each gets a subclass of its own
class. The denoiser's forward goes to the engine; the pipeline's call is serialised.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from ...denoiser import AsyncDenoiser
from ...errors import InputError, PlanError, SchedulerError
from ...generation import GenerationReport
from ...graph.capture import capture
from ...graph.example_inputs import example_inputs
from ...graph.hooks import check_hooks
from ...graph.signature import Call, Role, parse
from ...partition.cost import measure as measure_costs
from ...partition.ownership import Split, check_split_argument
from ...partition.partition import Partition, partition
from ...progress import Progress
from ...runtime.devices import Devices
from ...sampling.auto_warmup import AutoWarmup
from ...sampling.calibration import Calibration
from ...sampling.clean_image import CleanImage, clean_image
from ...sampling.scheduler import check_scheduler
from ...schedule.plan import Plan, check_numbers
from .checks import check_forward
from .probe import FirstCall, as_generation
from .subclass import denoiser_class, pipeline_class, twin
from .timesteps import TimestepTracker, is_mixed

log = logging.getLogger("asyncdiff")

#: So many changes in successive steps are taken for a change in every step.
_SHORT = 3


class Handle:
    """A parallelised pipeline. Keep it to look at what happens, and to undo it."""

    def __init__(self, pipe: Any, module: nn.Module, denoiser: AsyncDenoiser) -> None:
        self.pipe = pipe
        self.denoiser = denoiser
        self._module = module
        self._times: TimestepTracker | None = None
        #: rests of a generation that followed each other after one step
        self._short = 0
        # One lock: a generation of the denoiser's own must not come between two steps.
        self._lock = denoiser.lock
        self._interrupting = False
        #: whether the pipeline is being called
        self._running = False
        #: whether options of the denoiser may change in the middle of a generation
        self._watching = True
        # It would go past the denoiser's class, and be exported in the place of its forward.
        self._compiled = module.__dict__.pop("_compiled_call_impl", None)
        self._originals = (type(pipe), type(module))
        module.__class__ = denoiser_class(cast(Any, type(module)))
        module.__dict__["_asyncdiff"] = self
        pipe.__class__ = pipeline_class(cast(Any, type(pipe)))
        pipe.__dict__["_asyncdiff"] = self

    @property
    def partition(self) -> Partition:
        """How the denoiser is split for the inputs seen last; InputError before the first run."""
        return self.denoiser.partition

    def plan(self, steps: int) -> Plan:
        """The plan of a generation with this many steps."""
        return self.denoiser.plan(steps)

    def report(self) -> GenerationReport:
        """What the last generation did: steps, ticks, ms, exchange bytes, exposed exchange."""
        return self.denoiser.report()

    def calibrate(self, *args: Any, **kwargs: Any) -> Calibration:
        """Fit how waves predict clean images to this pipeline, and use it from now on.

        Call it as the pipeline, with a few prompts of the kind that will be drawn, eight or more
        (two at least), and the number of steps and the guidance that will be used. The pipeline
        itself runs to its first step only; from its latents and conditioning, five generations
        follow. See :meth:`asyncdiff.AsyncDenoiser.calibrate`, also for the errors raised;
        InputError for pipelines that begin in the middle of a schedule.
        """
        with self._lock:
            self._interrupting = True
            try:
                self.pipe(*args, **kwargs)
            except FirstCall as seen:
                call = seen.call
            else:
                raise InputError("the pipeline did not call its denoiser: give it steps to take")
            finally:
                self._interrupting = False
            return self.denoiser.calibrate(**as_generation(self.pipe, self.denoiser, call))

    def restore(self) -> None:
        """Make the pipeline what it was, weights back on their device. Safe to call twice."""
        with self._lock:
            if self._module.__dict__.get("_asyncdiff") is not self:
                return
            self.pipe.__class__, self._module.__class__ = self._originals
            del self._module.__dict__["_asyncdiff"], self.pipe.__dict__["_asyncdiff"]
            if self._compiled is not None:
                self._module.__dict__["_compiled_call_impl"] = self._compiled
            self.denoiser.close()

    def __reduce__(self) -> Any:
        raise InputError(
            "a parallelised pipeline or denoiser cannot be pickled or copied deeply: call "
            "handle.restore() first"
        )

    def _forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        with self._lock:
            call = self.denoiser.parse(args, kwargs)
            if self._interrupting:
                raise FirstCall(call)
            where = call.indices(Role.TIMESTEP)
            if not where:
                raise InputError("the denoiser has no timestep argument: use AsyncDenoiser")
            time = call.tensors[where[0]]
            try:
                with self._due(call, time):
                    assert self._times is not None
                    step = self.denoiser.step
                    self._times.check(step, time)
                    known = self._times.known(step, time)
                    if known is not time:
                        call = call.replacing(where[0], known)
                    result = self.denoiser.call(call)
                if not self.denoiser.active:
                    self._times.finish()
            except BaseException:
                self.denoiser.stop()
                raise
            return result

    def _due(self, call: Call, time: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        """Begins a generation where this call does not belong to the one under way; what it returns
        is to be open during the call."""
        scheduler, denoiser = self.pipe.scheduler, self.denoiser
        old = self._times
        if old is None or not denoiser.active or old.source is not check_scheduler(scheduler):
            check_forward(self._module)
            # Left by an earlier run, where another caller than the pipeline is under way.
            steps = getattr(self.pipe, "num_timesteps", None) if self._running else None
            self._times, self._short = TimestepTracker(scheduler, time, steps), 0
            self._check_mixed(time)
            try:
                denoiser.start(self._times.values, self._clean(scheduler))
            except PlanError as e:
                if not self._times.start:
                    raise
                raise PlanError(
                    f"{e}. It begins with timestep number {self._times.start} (from 0) of its "
                    f"scheduler's {len(self._times.source)}"
                ) from e
        elif not denoiser.fits(call, options=self._watching):
            # Guidance that ends early, an adapter that is switched off: the rest of the steps is a
            # generation of its own, if this is the step that was due.
            step = denoiser.step
            old.check(step, time)
            old.finish()
            self._short = self._short + 1 if step == 1 else 0
            if self._short == _SHORT:
                raise InputError(
                    "the denoiser's inputs (shapes, dtypes, constants) or options change in every "
                    "step, and each time it has to be prepared anew: keep them for more steps, or "
                    "pass as a tensor what changes"
                )
            self._times = old.after(step)
            left = len(self._times.values)
            log.info("the denoiser's inputs or options changed: %d steps are left for these", left)
            with denoiser.at_most(left):
                denoiser.start(self._times.values, self._clean(scheduler))
            return denoiser.at_most(left)
        return contextlib.nullcontext()

    def _check_mixed(self, time: torch.Tensor) -> None:
        ahead = self.denoiser.stride > 1 or self.denoiser.time_shift
        if (ahead or self.denoiser.schedule == "wavefront") and is_mixed(time):
            raise SchedulerError(
                "the denoiser was called with several timesteps at once, for the parts of its "
                "input (image to video, for example), of which other steps' cannot be told "
                "ahead: take stride=1 without time_shift, and schedule='asyncdiff'"
            )

    def _clean(self, scheduler: Any) -> CleanImage | None:
        if self.denoiser.schedule != "wavefront":
            return None
        assert self._times is not None
        whole = clean_image(scheduler, backwards=self._times.backwards)
        return whole.of_steps(self._times.start, self._times.values.shape[0])

    def _run(self, run: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        with self._lock:
            if self._running:
                raise InputError(
                    "the pipeline was called in the middle of a call of its own (by a callback?), "
                    "whose steps would be lost: call it afterwards, or another pipeline"
                )
            # Whatever an earlier call left unfinished has nothing to do with this one.
            self.denoiser.stop()
            self._running = True
            # Looking goes through all submodules, in every step.
            self._watching = any(k.startswith("callback") and v for k, v in kwargs.items())
            try:
                return run(self.pipe, *args, **kwargs)
            finally:
                self._running, self._watching = False, True
                self.denoiser.stop()


def parallelize(
    pipe: Any,
    devices: Devices = None,
    components: int = 2,
    stride: int = 1,
    warmup: int | str | AutoWarmup = 1,
    split: Split = "auto",
    time_shift: bool = False,
    *,
    schedule: str = "asyncdiff",
    delay: int | None = None,
    order: float | Calibration | None = None,
    exact_tail: int = 0,
    extrapolate: float = 0.0,
    guidance: str = "batched",
    warmup_mode: str = "chain",
    compile: bool | None = None,
    progress: Progress | None = None,
    deadline: float | None = None,
) -> Handle:
    """Run the denoiser of a diffusers pipeline on several devices at once.

    The pipeline is used as before; a new generation is noticed by itself. Preparation (export,
    measuring, CUDA graphs) happens at the first call with inputs of a new shape.

    Args:
        pipe: a pipeline with ``.unet`` or ``.transformer`` whose scheduler calls it once a step.
        devices: one entry a rank, components + stride − 1 of them (with schedule="wavefront" as
            many as components), which may repeat (``["cuda:0", "cuda:1"]``, ``["cpu"] * 3``).
            None takes all GPUs, else the CPU.
        components: N, the parts that the denoiser is split into.
        stride: S, the sampler steps that one parallel batch serves.
        warmup: w ≥ 1, the first steps, run exactly; w = steps gives the pipeline's own result.
            "auto", or an :class:`asyncdiff.AutoWarmup`: by how the denoiser's output changes.
        split: "auto", "estimate", lists of module paths, or cuts; see
            :class:`asyncdiff.AsyncDenoiser`.
        time_shift: pass the timestep one index earlier in asynchronous steps.
        schedule: "asyncdiff", as published, or "wavefront": closer to the sequential result, at the
            same speed (docs/guide/waves.md). The pipeline owns the latents, so that steps which it
            took on predictions are not taken again when the exact ones arrive;
            :meth:`asyncdiff.AsyncDenoiser.generate` can (``correct``).
        delay, order, exact_tail, extrapolate: see :class:`asyncdiff.AsyncDenoiser`.
        guidance, warmup_mode: "batched" and "chain", or "split"; see
            :class:`asyncdiff.AsyncDenoiser`.
        compile, progress: compile the components with inductor; see
            :class:`asyncdiff.AsyncDenoiser`.
        deadline: see :class:`asyncdiff.AsyncDenoiser`.

    Raises PlanError, PartitionError, DeviceError, InputError or SchedulerError, and leaves the
    pipeline untouched. While a pipeline runs, CaptureError where the denoiser cannot be exported.
    """
    module = find_denoiser(pipe)
    if getattr(pipe, "transformer_2", None) is not None:
        raise InputError(
            f"{type(pipe).__name__} has two denoisers, for the first and for the last steps, of "
            "which asyncdiff would see one: use asyncdiff.AsyncDenoiser on each"
        )
    if "_asyncdiff" in module.__dict__:
        raise InputError("this pipeline is parallelised already: call handle.restore() first")
    check_hooks(module)
    check_forward(module)
    scheduler = getattr(pipe, "scheduler", None)
    if getattr(scheduler, "order", 1) != 1:
        check_scheduler(scheduler)
    denoiser = AsyncDenoiser(
        twin(module),
        devices=devices,
        components=components,
        stride=stride,
        warmup=warmup,
        split=split,
        time_shift=time_shift,
        schedule=schedule,
        delay=delay,
        order=order,
        exact_tail=exact_tail,
        extrapolate=extrapolate,
        guidance=guidance,
        warmup_mode=warmup_mode,
        compile=compile,
        progress=progress,
        deadline=deadline,
    )
    return Handle(pipe, module, denoiser)


def find_denoiser(pipe: Any) -> nn.Module:
    """``pipe.unet`` or ``pipe.transformer``; raises InputError if there is none."""
    for name in ("unet", "transformer"):
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            return module
    raise InputError(
        f"{type(pipe).__name__} has neither .unet nor .transformer: use asyncdiff.AsyncDenoiser on "
        "its denoiser"
    )


def plan_partition(
    pipe: Any,
    components: int,
    split: Split = "auto",
    *,
    device: str | torch.device | None = None,
    measure: bool | None = None,
    height: int | None = None,
    width: int | None = None,
    copies: int = 1,
) -> Partition:
    """How a pipeline's denoiser would be split, without running the pipeline.

    Engines may cut elsewhere: they measure the links, and components once these are placed.

    Inputs are made up from the denoiser's configuration (batch 2, for guidance) for pictures of
    ``height`` × ``width`` pixels (default: the denoiser's own size). ``measure``: time the nodes
    on ``device`` (default: there where the denoiser is, unless that is the meta device).
    ``copies``: ranks that run the last component, as many as the stride but for waves.
    """
    check_numbers(components, 1, 1)
    module = find_denoiser(pipe)
    check_split_argument(module, split, components)
    args = example_inputs(
        module, height=height, width=width, scale=getattr(pipe, "vae_scale_factor", 1)
    )
    call = parse(module, (), args)
    captured = capture(module, call)
    home = call.tensors[0].device
    where = torch.device(device) if device is not None else home
    costs = None
    if measure if measure is not None else where.type != "meta" and home.type != "meta":
        costs = measure_costs(captured, call.tensors, where)
    return partition(captured, components, split, costs=costs, copies=copies)
