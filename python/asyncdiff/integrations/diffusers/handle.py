"""A parallelised pipeline: what its handle knows and does, call by call of the denoiser."""

from __future__ import annotations

import contextlib
import inspect
import logging
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from ...config import ParallelConfig, ReadOnlySettings
from ...denoiser import AsyncDenoiser
from ...errors import BatchError, InputError, PlanError, SchedulerError
from ...generation import GenerationReport
from ...graph.hooks import check_forward
from ...graph.signature import Call, Role
from ...microbatches import whole
from ...partition.partition import Partition
from ...sampling.calibration import Calibration
from ...sampling.clean_image import CleanImage, clean_image
from ...sampling.response import Response, respond
from ...sampling.scheduler import check_scheduler
from ...schedule.plan import Plan
from .auto import AutoSettings
from .call_sites import check_calls
from .probe import FirstCall, as_generation
from .step_bar import preparing
from .subclass import HANDLE, denoiser_class, original, pipeline_class
from .timesteps import TimestepTracker, is_mixed

log = logging.getLogger("asyncdiff")

#: So many changes in successive steps are taken for a change in every step.
_SHORT = 3
#: Settings that a handle's text names.
_SHOWN = (
    *("components", "stride", "warmup", "schedule", "exact_tail", "time_shift"),
    *("extrapolate", "guidance", "warmup_mode", "compile"),
)
_NOTHING = contextlib.nullcontext()


class Handle(ReadOnlySettings):
    """A parallelised pipeline. Keep it to look at what happens, and to undo it.

    Also a context, at whose end the pipeline is what it was: ``with asyncdiff.parallelize(pipe):``.
    """

    def __init__(
        self,
        pipe: Any,
        module: nn.Module,
        denoiser: AsyncDenoiser,
        auto: AutoSettings | None = None,
    ) -> None:
        self.pipe = pipe
        self.denoiser = denoiser
        self._auto = auto
        self._module = module
        self._times: TimestepTracker | None = None
        #: what the scheduler makes of predictions from which step on, or why that is not known
        self._response: tuple[int, Response | SchedulerError] | None = None
        #: arguments of the call that go to the scheduler's steps
        self._options: dict[str, Any] = {}
        #: rests of a generation that followed each other after one step
        self._short = 0
        self._interrupting = False
        #: the pipeline that is being called, which may be a copy
        self._caller: Any = None
        #: the bar of its steps, where it has made one
        self.shown: Any = None
        #: whether options of the denoiser may change in the middle of a generation
        self._watching = True
        # It would go past the denoiser's class, and be exported in the place of its forward.
        self._compiled = module.__dict__.pop("_compiled_call_impl", None)
        #: what has a class of ours: the pipeline, the denoiser, shallow copies of both
        self._taken: list[weakref.ref[Any]] = []
        self.take(module, denoiser_class(cast(Any, type(module))))
        self.take(pipe, pipeline_class(cast(Any, type(pipe))))

    @property
    def active(self) -> bool:
        """Whether the pipeline is parallelised by this handle; not after :meth:`restore`."""
        return self._module.__dict__.get(HANDLE) is self

    @property
    def config(self) -> ParallelConfig:
        """The settings; :meth:`configure` changes some of them."""
        return self.denoiser.config

    @property
    def settings(self) -> str:
        """The settings that were picked for the last generation, and why; those given by hand."""
        if self._auto is None:
            return "given by hand"
        return str(self._auto.picked or f"quality={self._auto.quality!r} picks at the first call")

    def configure(self, **changes: Any) -> None:
        """Change settings between generations; see :meth:`asyncdiff.AsyncDenoiser.configure`. Where
        a quality was asked for, they are not picked any more for generations with asynchronous
        steps."""
        if self._auto is not None:
            changes = self._auto.given(self.config, changes)
        self.denoiser.configure(**changes)

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
        """Fit how waves predict clean images to this pipeline, and use it from now on, or the
        default where it does not win.

        Call it as the pipeline, with prompts of the kind that will be drawn, eight at least and
        sixteen or more better, and the number of steps and the guidance that will be used. The
        pipeline itself runs to its first step only; from its latents and conditioning, three
        generations follow. See :meth:`asyncdiff.AsyncDenoiser.calibrate`, also for the errors
        raised; InputError for pipelines that begin in the middle of a schedule, PlanError where a
        quality chooses the settings.
        """
        if self._auto is not None:
            raise PlanError(
                f"quality={self._auto.quality!r} chooses settings for each generation, and a "
                "calibration is for fixed ones: parallelise with schedule='wavefront' and the "
                "number of exact steps that you want, then calibrate"
            )
        with self.denoiser.lock:
            self._interrupting = True
            try:
                self.pipe(*args, **kwargs)
            except FirstCall as seen:
                call = seen.call
            else:
                raise InputError("the pipeline did not call its denoiser: give it steps to take")
            finally:
                self._interrupting = False
            return self.denoiser.calibrate(**as_generation(self.pipe, call))

    def restore(self) -> None:
        """Make the pipeline what it was, weights back on their device. Safe to call twice."""
        with contextlib.nullcontext() if self.denoiser.forked else self.denoiser.lock:
            if not self.active:
                return
            for reference in self._taken:
                taken = reference()
                if taken is not None:
                    taken.__class__ = original(taken)
                    del taken.__dict__[HANDLE]
            self._taken.clear()
            if self._compiled is not None:
                self._module.__dict__["_compiled_call_impl"] = self._compiled
            self.denoiser.close()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def __repr__(self) -> str:
        config = self.denoiser.config
        where = ", ".join(map(str, self.denoiser.devices))
        settings = ", ".join(f"{name}={getattr(config, name)!r}" for name in _SHOWN)
        return (
            f"<asyncdiff.Handle of {type(self.pipe).__name__}: {type(self._module).__name__} on "
            f"{where}; {settings}; {self._state()}>"
        )

    def _state(self) -> str:
        if not self.active:
            return "restored"
        if self.denoiser.active and self._caller is not None:
            assert self._times is not None
            return f"at step {self.denoiser.step} of {len(self._times.values)}"
        try:
            return f"last generation: {self.report()}"
        except InputError:
            return "not used yet"

    def __reduce__(self) -> Any:
        raise InputError(
            "a parallelised pipeline or denoiser cannot be pickled or copied deeply: call "
            "handle.restore() first"
        )

    def take(self, what: Any, cls: type) -> None:
        """Give a pipeline or denoiser one of the classes of :mod:`.subclass`, until
        :meth:`restore`."""
        what.__class__ = cls
        what.__dict__[HANDLE] = self
        self._taken.append(weakref.ref(what))

    def check_dtype(self, dtype: torch.dtype | None) -> None:
        """Raise InputError where the weights have another dtype, which their ranks keep."""
        weight = next(self._module.parameters(), None)
        if dtype is not None and weight is not None and dtype != weight.dtype:
            raise InputError(
                f"the denoiser's weights are spread over its ranks in {weight.dtype}: call "
                f"handle.restore(), change it to {dtype}, and call asyncdiff.parallelize() again"
            )

    def _forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        # The denoiser's: a generation of its own must not come between two steps.
        with self.denoiser.lock:
            call = self.denoiser.parse(args, kwargs)
            if self._interrupting:
                raise FirstCall(call)
            where = call.indices(Role.TIMESTEP)
            if not where:
                raise InputError("the denoiser has no timestep argument: use AsyncDenoiser")
            time = call.tensors[where[0]]
            try:
                return self._step(call, time)
            except BatchError as e:
                # Before anything was computed: the settings were picked for parts of the batch.
                self.denoiser.stop()
                if self._auto is None or not self._auto.keep_together(call):
                    raise
                log.warning("settings are picked once more: %s", e)
            return self._step(call, time)

    def _step(self, call: Call, time: torch.Tensor) -> Any:
        """The denoiser's result for a call with this timestep."""
        where = call.indices(Role.TIMESTEP)
        try:
            with self._due(call, time) or _NOTHING:
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

    def _due(self, call: Call, time: torch.Tensor) -> contextlib.AbstractContextManager[Any] | None:
        """Begin a generation where this call does not belong to the one under way; what is returned
        then is to be open during the call."""
        denoiser, old = self.denoiser, self._times
        scheduler = (self._caller or self.pipe).scheduler
        step = denoiser.step
        if old is None or not denoiser.active or old.source is not check_scheduler(scheduler):
            check_forward(self._module)
            if self._caller is not None:
                unet = getattr(self._caller, "unet", None) is self._module
                check_calls(self._caller, "unet" if unet else "transformer")
            # Left by an earlier run, where another caller than the pipeline is under way.
            steps = getattr(self._caller, "num_timesteps", None)
            self._short = 0
            times = TimestepTracker(scheduler, time, steps, old)
            self._response = None  # of a scheduler that has not stepped yet
            return self._begin(times, time, call)
        if step == old.telling:
            corrected = old.corrected(step, time)
            if corrected is not None:
                log.info("timesteps turned out to be %s: the rest begins", corrected.reading.way)
                return self._begin(corrected, time, call)
        if denoiser.fits(call, options=self._watching):
            return None
        # Guidance that ends early, an adapter that is switched off: the rest of the steps is a
        # generation of its own, if this is the step that was due.
        old.check(step, time)
        old.finish()
        self._short = self._short + 1 if step == 1 else 0
        if self._short == _SHORT:
            raise InputError(
                "the denoiser's inputs (shapes, dtypes, constants) or options change in every "
                "step, and each time it has to be prepared anew: keep them for more steps, or "
                "pass as a tensor what changes"
            )
        log.info("the denoiser's inputs or options changed in step %d: the rest begins", step)
        return self._begin(old.after(step), time, call)

    def _begin(
        self, times: TimestepTracker, time: torch.Tensor, call: Call
    ) -> contextlib.AbstractContextManager[Any]:
        """Begin a generation of these steps. What is returned is to be open in its first call."""
        self._times = times
        if self._auto is not None:
            self._auto.settle(self.denoiser, call, len(times.values), self._served(times))
        config, clean = self.config, None
        waves = config.schedule == "wavefront"
        if (config.stride > 1 or config.time_shift or waves) and is_mixed(time):
            raise SchedulerError(
                "the denoiser was called with several timesteps at once, for the parts of its "
                "input (image to video, for example), of which other steps' cannot be told "
                "ahead: take stride=1 without time_shift, and schedule='asyncdiff'"
            )
        if waves:
            clean = self._clean_image(times)
        self.denoiser.start(config.spec(times.values, shorten=True), clean)
        return preparing(self.shown)

    def _clean_image(self, times: TimestepTracker) -> CleanImage:
        """The clean images of these steps. Raises SchedulerError where they cannot be told."""
        scheduler = (self._caller or self.pipe).scheduler
        every = clean_image(scheduler, backwards=times.reading.backwards)
        clean = every.of_steps(times.start, len(times.values))
        if self._response is None:
            try:
                response = respond(scheduler, times.start, self._options)
                if times.start:
                    every.of_steps(times.start, len(response.start) - 1).check_levels(response)
                self._response = times.start, response
            except SchedulerError as e:
                self._response = times.start, e
        first, found = self._response
        if isinstance(found, SchedulerError):
            return clean
        return replace(clean, response=found.of_steps(times.start - first, len(times.values)))

    def _served(self, times: TimestepTracker) -> CleanImage | str:
        """The clean images of steps that waves serve well, or why they do not."""
        try:
            clean = self._clean_image(times)
        except SchedulerError:
            return "waves do not know this sampler's noise levels"
        assert self._response is not None
        if isinstance(self._response[1], SchedulerError):
            return str(self._response[1])
        return clean

    def _run(self, pipe: Any, run: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        with self.denoiser.lock:
            if self._caller is not None:
                raise InputError(
                    "the pipeline was called in the middle of a call of its own (by a callback?), "
                    "whose steps would be lost: call it afterwards, or another pipeline"
                )
            # Whatever an earlier call left unfinished has nothing to do with this one.
            self.denoiser.stop()
            self._caller = pipe
            # Looking goes through all submodules, in every step.
            self._watching = any(k.startswith("callback") and v for k, v in kwargs.items())
            self._options = _step_options(pipe, args, kwargs)
            try:
                return whole(run(pipe, *args, **kwargs))
            finally:
                self._caller, self.shown, self._watching = None, None, True
                self.denoiser.stop()


def _step_options(pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What of a pipeline's arguments decides how its scheduler steps."""
    if "eta" not in inspect.signature(pipe.scheduler.step).parameters:
        return {}
    try:
        call = inspect.signature(type(pipe).__call__).bind(pipe, *args, **kwargs)
    except TypeError:  # the pipeline will say so itself
        return {}
    call.apply_defaults()
    return {"eta": eta} if (eta := call.arguments.get("eta")) else {}
