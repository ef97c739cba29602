"""The calls of a parallelised denoiser: which generation, branch and step each of them belongs to,
and how a generation begins."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ...denoiser import AsyncDenoiser
from ...errors import BatchError, InputError, MemoryLimitError, SchedulerError, TokensError
from ...generation.report import GenerationReport
from ...generation.spec import GenerationSpec
from ...graph.hooks import check_forward
from ...graph.signature import Call, Role, is_mixed
from ...sampling.clean_image import CleanImage, clean_image
from ...sampling.response import Response, respond
from ...sampling.scheduler import check_scheduler
from ...schedule.branch import Branch
from ..auto import AutoSettings
from .branches import BranchFinder, CallBranch
from .call_sites import calls_in_a_step, most_conditions
from .step_bar import preparing
from .subclass import CALLS
from .timesteps import TimestepTracker

log = logging.getLogger("asyncdiff")

#: So many changes in successive steps are taken for a change in every step.
_SHORT = 3
_NOTHING = contextlib.nullcontext()


@dataclass
class Run:
    """A call of the pipeline that is under way: what of it matters to its denoiser's calls.

    ``pipe`` may be a copy; None: other code calls the denoiser. ``options`` are the arguments that
    go to the scheduler's steps. ``watching``: whether options of the denoiser may change in the
    middle. ``shown``: the bar of its steps, where it has made one. ``begun``: whether a denoiser
    was called.
    """

    pipe: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    watching: bool = True
    shown: Any = None
    begun: bool = False


class Calls:
    """Serves the calls of one denoiser of the pipeline ``pipe``: that which it has as ``name``.
    ``leads``: the pipeline has another one for the later steps."""

    def __init__(
        self,
        pipe: Any,
        name: str,
        denoiser: AsyncDenoiser,
        auto: AutoSettings | None,
        *,
        leads: bool = False,
    ) -> None:
        self._pipe, self.name = pipe, name
        self.module: nn.Module = getattr(pipe, name)
        self.denoiser, self.auto = denoiser, auto
        self._leads = leads
        #: what came of the pipeline's last call, if this denoiser had a part in it
        self.report: GenerationReport | None = None
        self.run = Run()
        #: classes of schedulers that this pipeline has asked for steps
        self._stepping: set[type] = set()
        self._found = BranchFinder(self._stepping)
        #: calls in a step, as far as that is known; how many the pipeline's code tells of, and how
        #: many there were where it told so
        self._expected = 1
        self._told: int | None = None
        self._were: dict[int | None, int] = {}
        #: what is wrong with a first call, unless a second one follows in the same step
        self._alone: BatchError | None = None
        #: what the scheduler makes of predictions from which step on, or why that is not known
        self._response: tuple[int, Response | SchedulerError] | None = None
        #: the tracker of the generation before
        self._before: TimestepTracker | None = None
        #: what the caller calls the branch whose calls come now
        self._branch_name: str | None = None
        #: what was found in the place of the denoiser
        self._replaced: Any = None
        # It would go past the denoiser's class, and be exported in the place of its forward.
        self._compiled = self.module.__dict__.pop("_compiled_call_impl", None)

    def told(self, pipe: Any) -> int | None:
        """How many calls a step has by the code of a pipeline that runs, or by its guider, if it is
        modular; None: that does not tell."""
        guided = most_conditions(getattr(pipe, "guider", None))
        return calls_in_a_step(pipe, self.name) if guided is None else guided

    @property
    def progress(self) -> tuple[int, int] | None:
        """The step that is under way and how many there are, in the middle of a generation."""
        for branch in self._found.all[:1]:
            if branch.active and branch.generation is not None:
                return branch.generation.next_step, branch.generation.steps
        return None

    def begin(self, run: Run) -> None:
        """The pipeline is called. Whatever an earlier call left has nothing to do with this one."""
        self._forget()
        self.run = run
        self._look_at(getattr(run.pipe, self.name, None))

    def _look_at(self, denoiser: Any) -> None:
        """Warn of one that somebody has put in the place of this one, and that nobody spreads."""
        denoiser = getattr(denoiser, "_orig_mod", denoiser)
        if denoiser is None or CALLS in vars(denoiser) or self._replaced is denoiser:
            return
        self._replaced = denoiser
        log.warning(
            "pipe.%s is another denoiser than the one that was parallelised, and runs as it is: "
            "call asyncdiff.parallelize(pipe) again",
            self.name,
        )

    def settle(self) -> None:
        """The pipeline has returned: wait for what is still to do, and raise what went wrong."""
        self.denoiser.settle()
        for branch in self._found.all:
            if branch.times is not None:
                branch.times.finish()
        if self._found.all:
            self._were[self._told] = len(self._found.all)
        finished = any(b.generation is not None and b.generation.finished for b in self._found.all)
        self.report = self.denoiser.report() if finished else None

    def end(self) -> None:
        """The pipeline's call is over, in one way or another."""
        self._forget()
        self.run = Run()

    def restore(self) -> None:
        """Make the denoiser what it was."""
        if self._compiled is not None:
            self.module.__dict__["_compiled_call_impl"] = self._compiled
        self.denoiser.close()

    @contextlib.contextmanager
    def named(self, name: str) -> Iterator[None]:
        """Calls of the denoiser inside are of the branch that the pipeline gives this name."""
        before, self._branch_name = self._branch_name, name
        try:
            yield
        finally:
            self._branch_name = before

    @property
    def dtype(self) -> torch.dtype | None:
        """What the denoiser computes in, where its weights are not stored in that."""
        weight = next(self.module.parameters(), None)
        return getattr(self.module, "dtype", None if weight is None else weight.dtype)

    def check_dtype(self, dtype: torch.dtype | None) -> None:
        """Raise InputError where the weights have another dtype, which their ranks keep."""
        own = self.dtype
        if dtype is not None and dtype != own:
            raise InputError(
                f"the denoiser's weights are spread over its ranks in {own}: call "
                f"handle.restore(), change it to {dtype}, and call asyncdiff.parallelize() again"
            )

    def _forget(self) -> None:
        self._alone = None
        self.denoiser.stop()
        self._found = BranchFinder(self._stepping)

    def serve(self, call: Call) -> Any:
        """The denoiser's result."""
        where = call.signature.places[Role.TIMESTEP]
        if not where:
            raise InputError("the denoiser has no timestep argument: use AsyncDenoiser")
        time = call.tensors[where[0]]
        try:
            branch = self._branch_of(call, time)
            while True:
                try:
                    result = self._step(branch, call, time)
                    break
                except (BatchError, TokensError, MemoryLimitError) as e:
                    # Before anything was computed: the settings are for parts of what has none, or
                    # for more than there is room for.
                    if not self._try_again(call, e):
                        raise
                self.denoiser.stop()
                branch.times = None
                for every in self._found.all:  # of a step, too, the rest begins
                    every.generation = None
        except BaseException:
            self._forget()
            raise
        self._found.returned()
        return result

    def _try_again(self, call: Call, error: BatchError | TokensError | MemoryLimitError) -> bool:
        """Whether a call whose batch, or tokens, have no parts, or that has no room, is to be made
        once more, with other settings or as the first one of two."""
        if self.auto is not None:
            return self.auto.picks_again(call, error)
        if not isinstance(error, BatchError):
            return False
        if self.run.pipe is None or self._expected > 1:
            return False
        self._alone, self._expected = error, 2
        return True

    def _step(self, branch: CallBranch, call: Call, time: torch.Tensor) -> Any:
        """The denoiser's result for a call with this timestep."""
        where = call.indices(Role.TIMESTEP)
        with self._due(branch, call, time) or _NOTHING:
            times, generation = branch.times, branch.generation
            assert times is not None and generation is not None
            step = generation.next_step
            times.check(step, time)
            known = times.known(step, time)
            if known is not time:
                call = call.replacing(where[0], known)
            result = self.denoiser.call(call, branch.index)
        if generation.finished:
            for other in self._found.all:
                if other.times is not None and not other.active:
                    other.times.finish()
        return result

    # ---- which call it is --------------------------------------------------------------------

    @property
    def scheduler(self) -> Any:
        """That of the pipeline that runs."""
        return (self.run.pipe or self._pipe).scheduler

    def _branch_of(self, call: Call, time: torch.Tensor) -> CallBranch:
        scheduler = self.scheduler
        source = check_scheduler(scheduler)
        if self._found.all:
            lead = self._found.all[0].times
            if lead is None or lead.source is not source:
                self._forget()
        alone = self.run.pipe is None
        branch = self._found.find(call, time, self._branch_name, scheduler, alone=alone)
        if self._alone is not None and self._found.step > 0 and len(self._found.all) == 1:
            raise self._alone
        lead, start = self._found.all[0].times, self._found.all[0].start
        if lead is not None and self._found.step >= start + len(lead.values):
            # After its last step: another caller than the pipeline begins again.
            self._forget()
            branch = self._found.find(call, time, self._branch_name, scheduler, alone=alone)
        return branch

    def _due(
        self, branch: CallBranch, call: Call, time: torch.Tensor
    ) -> contextlib.AbstractContextManager[Any] | None:
        """Begin a generation where this call does not belong to the one under way; what is returned
        then is to be open during the call."""
        old, generation = branch.times, branch.generation
        if old is None:
            return self._begin(branch, self._first_times(branch, time), time, call)
        step = self._found.step - branch.start
        if generation is None or generation.next_step != step:
            # It was left out in steps before this one: what its ranks have is too old. Or it was
            # given up where another branch took other settings.
            return self._begin(branch, old.after(step), time, call)
        if step == old.telling:
            corrected = old.corrected(step, time)
            if corrected is not None:
                log.info("timesteps turned out to be %s: the rest begins", corrected.reading.way)
                return self._begin(branch, corrected, time, call)
        if self.denoiser.fits(call, options=self.run.watching, branch=branch.index):
            return None
        # Guidance that ends early, an adapter that is switched off: the rest of the steps is a
        # generation of its own, if this is the step that was due.
        old.check(step, time)
        old.finish()
        branch.short = branch.short + 1 if step == 1 else 0
        if branch.short == _SHORT:
            raise InputError(
                "the denoiser's inputs (shapes, dtypes, constants) or options change in every "
                "step, and each time it has to be prepared anew: keep them for more steps, or "
                "pass as a tensor what changes"
            )
        log.info("the denoiser's inputs or options changed in step %d: the rest begins", step)
        return self._begin(branch, old.after(step), time, call)

    def _first_times(self, branch: CallBranch, time: torch.Tensor) -> TimestepTracker:
        """The timesteps of a branch that is called for the first time."""
        lead = self._found.all[0]
        if lead is not branch:
            assert lead.times is not None
            return lead.times.after(self._found.step - lead.start)
        check_forward(self.module)
        pipe = self.run.pipe
        if pipe is not None and self._alone is None:
            self._told = self.told(pipe)
            self._expected = self._were.get(self._told, self._told or 1)
        self._response = None  # of a scheduler that has not stepped yet
        scheduler, ordered = self.scheduler, pipe is not None
        # Left by an earlier run, where another caller than the pipeline is under way.
        steps: int | None = getattr(pipe, "num_timesteps", None)
        times = TimestepTracker(scheduler, time, steps, self._before, ordered=ordered)
        share = getattr(getattr(pipe, "config", None), "boundary_ratio", None)
        if self._leads and share is not None:  # another denoiser has the later ones (Wan 2.2)
            times.end_before(share * scheduler.config.num_train_timesteps, time)
        return times

    # ---- how a generation begins -------------------------------------------------------------

    def _begin(
        self, branch: CallBranch, times: TimestepTracker, time: torch.Tensor, call: Call
    ) -> contextlib.AbstractContextManager[Any]:
        """Begin a generation of these steps. What is returned is to be open in its first call."""
        branch.times, branch.start = times, self._found.step
        self._before = times
        self._expected = max(self._expected, len(self._found.all))
        others = [b for b in self._found.all if b is not branch and b.active]
        if self.auto is not None and not others:
            served = self._served(times)
            self.auto.settle(self.denoiser, call, len(times.values), served, self._expected)
        config, clean = self.denoiser.config, None
        waves = config.schedule == "wavefront"
        if (config.stride > 1 or config.time_shift or waves) and is_mixed(time):
            raise SchedulerError(
                "the denoiser was called with several timesteps at once, for the parts of its "
                "input (image to video, for example), of which other steps' cannot be told "
                "ahead: take stride=1 without time_shift, and schedule='asyncdiff'"
            )
        if not times.reading.known and (config.stride > 1 or config.time_shift or waves):
            raise SchedulerError(
                f"the denoiser was called with timestep {float(time.reshape(-1)[0]):g}, which is "
                "made from the scheduler's timesteps in a way that is not known, so those of later "
                "steps cannot be told: take stride=1 without time_shift, and schedule='asyncdiff'"
            )
        if waves:
            clean = self._clean_image(times)
        spec = GenerationSpec.of(config, times.values, shorten=True)
        which = Branch(branch.index, self._expected)
        branch.generation = self.denoiser.start(spec, clean, branch=which)
        return preparing(self.run.shown)

    def _clean_image(self, times: TimestepTracker) -> CleanImage:
        """The clean images of these steps. Raises SchedulerError where they cannot be told."""
        scheduler = self.scheduler
        every = clean_image(scheduler, backwards=times.reading.backwards)
        clean = every.of_steps(times.start, len(times.values))
        if self._response is None:
            try:
                response = respond(scheduler, times.start, self.run.options)
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
        if not times.reading.known:
            return "how the denoiser's times are made from the timesteps is not known"
        try:
            clean = self._clean_image(times)
        except SchedulerError:
            return "waves do not know this sampler's noise levels"
        assert self._response is not None
        if isinstance(self._response[1], SchedulerError):
            return str(self._response[1])
        return clean
