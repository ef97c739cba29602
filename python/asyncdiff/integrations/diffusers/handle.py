"""A parallelised pipeline: what its handle knows and does, call by call of the denoiser."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from ...config import ParallelConfig, ReadOnlySettings
from ...denoiser import AsyncDenoiser
from ...errors import InputError, PlanError
from ...generation.report import GenerationReport, in_turn
from ...microbatches import whole
from ...partition.partition import Partition
from ...phases import recording
from ...progress import bar
from ...sampling.calibration import Calibration
from ...schedule.plan import Plan
from ..auto import AutoSettings
from .background import Background, plainly
from .calls import Calls, Run
from .probe import FirstCall, as_generation
from .rehearsal import Numbers, Preparation, Rehearsal, arguments, each_size, rehearse
from .step_count import counting
from .subclass import CALLS, HANDLE, denoiser_class, original, pipeline_class

#: Settings that a handle's text names.
_SHOWN = (
    *("components", "stride", "warmup", "schedule", "exact_tail", "time_shift"),
    *("extrapolate", "guidance", "exact_mode", "compile", "compress"),
)


class Handle(ReadOnlySettings):
    """A parallelised pipeline. Keep it to look at what happens, and to undo it.

    Also a context, at whose end the pipeline is what it was: ``with asyncdiff.parallelize(pipe):``.
    """

    def __init__(
        self,
        pipe: Any,
        denoisers: Mapping[str, tuple[AsyncDenoiser, AutoSettings | None]],
        plain: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.pipe = pipe
        self._calls = [
            Calls(pipe, name, denoiser, auto, leads=getattr(pipe, f"{name}_2", None) is not None)
            for name, (denoiser, auto) in denoisers.items()
        ]
        #: the denoiser; of several, that of the first steps
        self.denoiser = self._calls[0].denoiser
        self._auto = self._calls[0].auto
        self._interrupting = False
        self._rehearsal: Rehearsal | None = None
        #: prepares while ``plain`` denoisers draw, until that is done
        self._background = Background(plain, self._rehearse) if plain else None
        #: what has a class of ours: the pipeline, its denoisers, shallow copies of them
        self._taken: list[weakref.ref[Any]] = []
        for calls in self._calls:
            calls.module.__dict__[CALLS] = calls
            self.take(calls.module, denoiser_class(cast(Any, type(calls.module))))
        self.take(pipe, pipeline_class(cast(Any, type(pipe))))

    @property
    def denoisers(self) -> list[AsyncDenoiser]:
        """All of them: some pipelines have one for the first steps and one for the others."""
        return [calls.denoiser for calls in self._calls]

    @property
    def names(self) -> list[str]:
        """Under which names the pipeline has its denoisers."""
        return [calls.name for calls in self._calls]

    @property
    def active(self) -> bool:
        """Whether the pipeline is parallelised by this handle; not after :meth:`restore`."""
        return self._calls[0].module.__dict__.get(HANDLE) is self

    @property
    def config(self) -> ParallelConfig:
        """The settings; :meth:`configure` changes some of them."""
        return self.denoiser.config

    @property
    def settings(self) -> str:
        """The settings that were picked for the last generation, and why; those given by hand."""
        if self._auto is None:
            return "given by hand"
        picked = [str(c.auto.picked) for c in self._calls if c.auto is not None and c.auto.picked]
        told = " | ".join(dict.fromkeys(picked))
        return told or f"{self._auto} picks at the first call"

    def configure(self, **changes: Any) -> None:
        """Change settings between generations; see :meth:`asyncdiff.AsyncDenoiser.configure`. Where
        a quality was asked for, they are not picked any more for generations with asynchronous
        steps. Raises InputError after :meth:`restore`."""
        self._check_active()
        for calls in self._calls:
            mine = changes
            if calls.auto is not None:
                mine = calls.auto.given(calls.denoiser.config, changes)
            calls.denoiser.configure(**mine)

    @property
    def partition(self) -> Partition:
        """How the denoiser is split for the inputs seen last; InputError before the first run."""
        return self.denoiser.partition

    def plan(self, steps: int) -> Plan:
        """The plan of a generation with this many steps."""
        return self.denoiser.plan(steps)

    def report(self) -> GenerationReport:
        """What the last generation did: steps, ticks, ms, exchange bytes, exposed exchange. Raises
        InputError where there was none, plain ones do not count."""
        if self._background is not None and self._background.drawn:
            raise InputError(
                "all pictures so far were drawn plainly, while ranks are prepared: there is "
                "nothing to report before one that begins when handle.ready is true"
            )
        several = [c.report for c in self._calls if c.report] if len(self._calls) > 1 else []
        return in_turn(several) or self.denoiser.report()

    def prepare(
        self,
        height: Numbers = None,
        width: Numbers = None,
        *,
        batch: Numbers = 1,
        steps: int | None = None,
        **call: Any,
    ) -> list[Preparation]:
        """Prepare for pictures of these sizes ahead of the first one, and tell what that took.

        The pipeline runs to the end of its first step for each size, as it will for pictures:
        settings are chosen, the denoiser is exported, cut, placed, compiled, its CUDA graphs are
        recorded.

        Args:
            height, width: pixels, one number or one for each size (None: the pipeline's own). Four
                sizes used last stay prepared in this process.
            batch: pictures of a call, one number or one for each size.
            steps: of a generation (None: the pipeline's own).
            call: what else the pipeline is called with: what changes shapes, such as
                ``guidance_scale``, ``image``, ``num_frames``, or a ``prompt`` where its length
                matters (None: an empty one).

        Raises InputError where the pipeline does not run with these arguments, or is restored, and
        what its calls raise.
        """
        self._check_active()
        sizes = list(each_size(height, width, batch))
        made = []
        with contextlib.ExitStack() as stack:
            for calls in self._calls:
                stack.enter_context(calls.denoiser.lock)
            stack.enter_context(bar(self.config.progress))
            for h, w, count in sizes:
                given = arguments(self.pipe, h, w, count, steps, call)
                with recording() as spent:
                    self._rehearse(self.pipe, given)
                phases = spent.in_order()
                seconds = sum(phases.values())
                made.append(Preparation(h, w, count, steps, seconds, phases, self.settings))
        return made

    def _rehearse(self, pipe: Any, given: Mapping[str, Any]) -> None:
        with contextlib.ExitStack() as stack:
            for calls in self._calls:
                stack.enter_context(calls.denoiser.lock)
            self._rehearsal = Rehearsal(len(self._calls))
            try:
                rehearse(pipe, given)
            finally:
                self._rehearsal = None

    @property
    def ready(self) -> bool:
        """Whether pictures are drawn in parallel: with ``prepare="background"`` the first ones are
        not."""
        return self._background is None or self._background.over

    def wait(self) -> None:
        """With ``prepare="background"``: wait until preparing has ended, if it has begun."""
        if self._background is not None:
            self._background.wait()

    def calibrate(self, *args: Any, **kwargs: Any) -> Calibration:
        """Fit how waves predict clean images to this pipeline, and use it from now on, or the
        default where it does not win.

        Call it as the pipeline, with prompts of the kind that will be drawn, eight at least and
        sixteen or more better, and the number of steps and the guidance that will be used. The
        pipeline itself runs to its first step only; from its latents and conditioning, three
        generations follow. See :meth:`asyncdiff.AsyncDenoiser.calibrate`, also for the errors
        raised; InputError for pipelines that begin in the middle of a schedule, or are restored,
        PlanError where a quality chooses the settings.
        """
        self._check_active()
        if self._auto is not None and self._auto.quality:
            raise PlanError(
                f"quality={self._auto.quality!r} chooses settings for each generation, and a "
                "calibration is for fixed ones: parallelise with schedule='wavefront' and the "
                "number of exact steps that you want, then calibrate"
            )
        if len(self._calls) > 1:
            raise InputError(
                "this pipeline has two denoisers: calibrate each by AsyncDenoiser.calibrate()"
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

    def _check_active(self) -> None:
        """Raise InputError where this is about the pipeline no more."""
        if not self.active:
            raise InputError(
                "this handle's pipeline was restored, or parallelised anew since: call "
                "asyncdiff.parallelize(pipe) and use the handle that it returns"
            )

    def restore(self) -> None:
        """Make the pipeline what it was, weights back on their device. Safe to call twice."""
        if not self.denoiser.forked:
            self.wait()
        with contextlib.nullcontext() if self.denoiser.forked else self.denoiser.lock:
            if not self.active:
                return
            for reference in self._taken:
                taken = reference()
                if taken is not None:
                    taken.__class__ = original(taken)
                    del taken.__dict__[HANDLE]
                    taken.__dict__.pop(CALLS, None)
            self._taken.clear()
            for calls in self._calls:
                calls.restore()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def __repr__(self) -> str:
        config = self.denoiser.config
        where = ", ".join(map(str, self.denoiser.devices))
        settings = ", ".join(f"{name}={getattr(config, name)!r}" for name in _SHOWN)
        return (
            f"<asyncdiff.Handle of {type(self.pipe).__name__}: "
            f"{' and '.join(type(c.module).__name__ for c in self._calls)} on "
            f"{where}; {settings}; {self._state()}>"
        )

    def _state(self) -> str:
        if not self.active:
            return "restored"
        for calls in self._calls:
            progress = calls.progress
            if progress is not None and calls.run.pipe is not None:
                return "at step {} of {}".format(*progress)
        try:
            return f"last generation: {self.report()}"
        except InputError:
            plain = self._background is not None and self._background.drawn
            return "pictures so far were drawn plainly" if plain else "not used yet"

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
        """Raise InputError where a denoiser's weights have another dtype."""
        for calls in self._calls:
            calls.check_dtype(dtype)

    def forward(self, calls: Calls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What a denoiser's forward returns; its class of :mod:`.subclass` asks for it."""
        plain = plainly.get()
        if plain is not None:
            return plain[calls.name](*args, **kwargs)
        # The denoiser's: a generation of its own must not come between two steps.
        with calls.denoiser.lock:
            call = calls.denoiser.parse(args, kwargs)
            if self._interrupting:
                if calls.told(self.pipe) not in (None, 1):
                    raise InputError(
                        "this pipeline guides in several calls a step, and a calibration is for "
                        "guidance in one batch: use AsyncDenoiser.calibrate()"
                    )
                raise FirstCall(call)
            if self._rehearsal is not None:
                self._rehearsal.check(calls.scheduler)
            self._make_room(calls.run)
            result = calls.serve(call)
            if self._rehearsal is not None:
                self._rehearsal.called(calls, calls.scheduler)
            return result

    def _make_room(self, run: Run) -> None:
        """Before the first step, take models from the GPU that the pipeline offloads: the denoiser,
        whose turn it is, has no hook that would do it."""
        if not run.begun:
            run.begun = True
            for hook in getattr(run.pipe, "_all_hooks", ()):
                hook.offload()

    def show(self, bar: Any) -> None:
        """The pipeline has made the bar of its steps."""
        if plainly.get() is not None:
            return
        for calls in self._calls:
            calls.run.shown = bar

    def run(self, pipe: Any, run: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What ``run(pipe, *args, **kwargs)``, a call of the pipeline, returns."""
        background = self._background
        if background is not None and not background.here:
            background.begin(pipe, args, kwargs)
            if not background.over:
                with background.drawing():
                    return run(pipe, *args, **kwargs)
            self._background = None  # and with it, what has drawn meanwhile
        with contextlib.ExitStack() as stack:
            for calls in self._calls:
                stack.enter_context(calls.denoiser.lock)
            if self._calls[0].run.pipe is not None:
                raise InputError(
                    "the pipeline was called in the middle of a call of its own (by a callback?), "
                    "whose steps would be lost: call it afterwards, or another pipeline"
                )
            # Looking goes through all submodules, in every step.
            watching = any(k.startswith("callback") and v for k, v in kwargs.items())
            # A guider's hooks come and go within a step.
            watching = watching or getattr(pipe, "guider", None) is not None
            this = Run(pipe, _step_options(pipe, args, kwargs), watching)
            for calls in self._calls:
                stack.callback(calls.end)
                calls.begin(this)
            with counting(getattr(pipe, "scheduler", None)):
                result = whole(run(pipe, *args, **kwargs))
            for calls in self._calls:
                calls.settle()
            return result


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
