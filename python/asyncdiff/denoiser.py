"""A denoiser spread over several ranks: the front of the engine, without diffusers."""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import ParallelConfig
from .errors import InputError
from .generation.branches import Branches
from .generation.generate import Callback, Request, calibrate, generate
from .generation.generation import Generation, predictor_of
from .generation.phases import phases_of, plan_of
from .generation.report import GenerationReport
from .generation.spec import GenerationSpec
from .graph.signature import Call
from .microbatches import in_this_mode
from .partition.ownership import check_split_argument
from .partition.partition import Partition
from .phases import Spent, recording
from .processes.agreement import of_generation
from .runtime.cfg_parallel import Groups
from .runtime.engine import Engine
from .runtime.pipelined import joined
from .runtime.step import READY_NOW
from .sampling.calibration import Calibration
from .sampling.clean_image import CleanImage, last_steps
from .sampling.predictor import LatePredictor
from .schedule.branch import ONLY, Branch
from .schedule.plan import Plan
from .spread import Spread


class AsyncDenoiser(Spread):
    """``module`` split into components that run on several devices at once.

    Args:
        module: a denoiser in eval mode; any module that torch.export can export.
        example_args, example_kwargs: a call of it. With one, everything is prepared now; without,
            at the first call.
        group: the processes that own the ranks: a torch.distributed ProcessGroup, a dimension of a
            DeviceMesh, or "env" (torchrun's variables). None: this process owns them all. Else the
            ranks of the plan are those of the group, each on the device of its process;
            ``devices`` are then those of this process's own ranks (None: the one device that it
            uses). All processes make the same calls with the same arguments
            (docs/guide/processes.md).
        results: of a group, who gets noise predictions: "all" processes, or the "first", which then
            is the only one with a sampler that counts: latents of the others are not looked at, and
            they get zeros.
        checkpoint: a safetensors file, or a folder of diffusers with those of the denoiser. Ranks
            read their components' weights from there, so that no process holds the whole denoiser:
            ``module`` may be on the meta device; what it has is freed until :meth:`close`, which
            reads it again.
        devices, settings: by keyword, what :class:`asyncdiff.ParallelConfig` lists (``components``,
            ``warmup``, ``schedule``, …); ``config``: all of them at once, from which ``settings``
            differ.

    Calls happen inside a generation::

        with denoiser.generation(timesteps):
            for t in timesteps:
                noise = denoiser(latents, t, encoder_hidden_states=text)
                latents = ...

    Generations of several threads run one after another. Each takes the weights as they are when
    it begins, also where they were written to since the last one.

    Raises PlanError, PartitionError, DeviceError, CaptureError and InputError, each saying what
    to change; the module is then left as it was. With a group MismatchError where processes differ,
    ProcessError where one has ended or does not come; both name it.
    """

    def __init__(
        self,
        module: nn.Module,
        example_args: Sequence[Any] = (),
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        group: Any = None,
        results: str = "all",
        checkpoint: str | Path | None = None,
        config: ParallelConfig | None = None,
        **settings: Any,
    ) -> None:
        config = ParallelConfig.of(config, settings, group)
        check_split_argument(module, config.split, config.components)
        self._branches = Branches(functools.partial(setattr, self, "_report"))
        self._report: GenerationReport | None = None
        #: the branch that the caller says the next calls are of
        self._said: int | None = None
        self._engine: Engine | Groups | None = None  # that of the inputs seen last
        super().__init__(module, config, group, results, checkpoint)
        with contextlib.ExitStack() as undo:  # the user's module, should any of this fail
            undo.callback(self._team.close)
            undo.callback(self._weights.restore)
            undo.callback(self._engines.close)
            if example_args or example_kwargs:
                # What was half made would fill the device that the weights have to go back to.
                undo.push(lambda _, error, frames: traceback.clear_frames(frames))
                self.prepare(*example_args, **dict(example_kwargs or {}))
            undo.pop_all()

    def _let_go(self) -> None:
        self.stop()
        super()._let_go()
        self._engine = None

    @property
    def partition(self) -> Partition:
        """How the denoiser is split for the inputs seen last. Raises InputError before that."""
        if self._engine is None:
            raise InputError("nothing was captured yet: run the denoiser once, or call prepare()")
        return self._engine.partition

    def plan(self, steps: int) -> Plan:
        """The plan of a generation with this many steps, for each group of ranks; with
        exact_mode="split" without the exact steps that run split. Raises PlanError."""
        parts = None if self._engine is None else self._engine.partition
        return plan_of(GenerationSpec.of(self._config, range(steps)), parts)

    # ---- preparation -------------------------------------------------------------------------

    def prepare(self, *args: Any, steps: int | None = None, **kwargs: Any) -> Spent:
        """Capture, split and place the denoiser for calls like this one; what that took so far.

        ``steps``: also record the CUDA graphs of a generation with so many steps.
        """
        with self.lock, self.own_modes():
            call = self.parse(args, kwargs)
            self._check(call)
            if self.active and not self.fits(call):
                raise InputError(
                    "a generation with other inputs or options is under way, whose engine may have "
                    "to make room: prepare before it or after it"
                )
            with recording() as spent:
                self._engine, call = self._engine_for(call, beside=self._branches.engines(-1))
                if steps is not None:
                    spec = GenerationSpec.of(self._config, range(steps))
                    phases_of(spec, self._engines, self._engine, call)
            return self._took(self._engine, spent)

    # ---- generations -------------------------------------------------------------------------

    @contextlib.contextmanager
    def generation(
        self, timesteps: Sequence[Any] | torch.Tensor, scheduler: Any = None, branches: int = 1
    ) -> Iterator[Generation]:
        """A generation whose k-th call has ``timesteps[k]`` as the denoiser's timestep argument.

        ``scheduler``: the diffusers scheduler that takes the steps, its timesteps set; the last
        step is its last. Waves need it, to tell clean images. ``branches``: so many calls in each
        step, in turns (for guidance in two calls, 2), or as :meth:`branch` says, each of shapes of
        its own. With guidance="split" every second one has ranks of its own.

        Raises PlanError where warmup exceeds the number of steps, SchedulerError where waves have
        no scheduler, or one whose α and σ cannot be had.
        """
        with self.lock:
            self.stop()
            waves = self._config.schedule == "wavefront"
            clean = last_steps(scheduler, len(timesteps)) if waves else None
            try:
                spec = GenerationSpec.of(self._config, timesteps)
                every = [self.start(spec, clean, branch=b) for b in Branch.each(branches)]
                yield every[0]
                self.settle()
            except (Exception, KeyboardInterrupt, SystemExit) as e:
                # Others would wait for this process's next step until the deadline. Whoever leaves
                # without an error (GeneratorExit too) does so with them. Between hosts' GPUs this
                # ends the fabric for good, and the next generation makes another one.
                self._branches.stop(e if self._team.several else None)
                raise
            finally:
                self.stop()

    @contextlib.contextmanager
    def branch(self, index: int) -> Iterator[None]:
        """Says that the calls inside are of this branch of a generation, from 0."""
        with self.lock:
            before, self._said = self._said, index
            try:
                yield
            finally:
                self._said = before

    def start(
        self,
        spec: GenerationSpec,
        clean: CleanImage | None = None,
        predict: Callable[[Plan], LatePredictor] | None = None,
        branch: Branch = ONLY,
    ) -> Generation:
        """Begin a generation, giving up an unfinished one. Prefer :meth:`generation`.

        ``clean`` tells the clean images of these steps; waves need it, or ``predict``, which makes
        their predictor. ``branch``: of several that are called in a step; those of others go on.
        """
        with self.lock:
            if branch.count == 1:
                self.stop()
            if predict is None and spec.config.schedule == "wavefront" and not spec.all_exact:
                assert clean is not None
                predict = functools.partial(predictor_of, spec, clean)
            generation = Generation(spec, predict, branch, self._branches.known(spec.timesteps))
            self._branches.begin(generation)
            return generation

    def settle(self) -> None:
        """Wait for branches that have had all of their steps, and raise what went wrong."""
        with self.lock:
            self._branches.finish()

    def stop(self) -> None:
        """Give up the current generation, if one is unfinished."""
        with self.lock:
            self._branches.stop()

    @property
    def active(self) -> bool:
        """Whether a generation has steps left, of any branch."""
        return self._branches.active

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One step of the current generation: what ``module(*args, **kwargs)`` returns."""
        with self.lock:
            branch = self._branches.next() if self._said is None else self._said
            return self.call(self.parse(args, kwargs), branch)

    def fits(self, call: Call, *, options: bool = True, branch: int = 0) -> bool:
        """Whether the generation under way can go on with this call: inputs of the same signature
        and, with ``options``, of a denoiser whose options are what they were when it began."""
        with self.lock:
            generation = self._branches.get(branch)
            if generation is None or (engine := generation.engine) is None:
                return True
            same = call.signature == engine.signature and not engine.closed
            return same and not (options and self._engines.changed(engine))

    def call(self, call: Call, branch: int = 0) -> Any:
        """:meth:`__call__` for a call of a branch, as ``graph.signature.parse`` takes it apart."""
        branches = self._branches
        with self.lock:
            if branches.several:
                branches.came(branch, call)
            with self.own_modes():
                self._check(call)
                generation = branches.get(branch)
                if generation is None or generation.done:
                    raise InputError(
                        "no generation has steps left: call the denoiser inside "
                        "`with denoiser.generation(timesteps):`, once for each timestep"
                    )
                if generation.engine is None:
                    call = self._begin(generation, call)
                ready = branches.ready(call) if branches.several else READY_NOW
                result = branches.step(branch, call, ready)
            result = in_this_mode(result)
            if branches.several:
                branches.returned(call)
        return result

    def _begin(self, generation: Generation, call: Call) -> Call:
        def given() -> Mapping[str, str]:
            # A generation may begin in the middle, where only process 0 has latents that count.
            latents = not self._team.first_only
            return of_generation(self._config.compared(), generation.timesteps, first, latents)

        which, what = generation.branch, "begin a generation"
        with recording() as spent:
            first, beside = joined(call), self._branches.engines(which.index)
            self._engine, call = self._engine_for(
                first, which, what=what, given=given, beside=beside
            )
            phases = phases_of(generation.spec, self._engines, self._engine, call, which)
        every = self._took(self._engine, spent)
        generation.begin(phases, call, spent, every, self._branches.ready(call))
        return call

    def generate(
        self,
        latents: torch.Tensor,
        conditioning: Mapping[str, Any],
        scheduler: Any,
        *,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        callback: Callback | None = None,
        timestep_argument: Callable[[torch.Tensor], torch.Tensor] | None = None,
        step_options: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """A whole generation: the final latents, where and in the dtype that the first ones have.

        Args:
            latents: the first latents, batch first, scaled as the scheduler wants them (a pipeline
                multiplies noise by ``scheduler.init_noise_sigma``).
            conditioning: the denoiser's other arguments, by name, the same in every step. With
                guidance their batch is twice that of the latents, the unconditional half first.
            scheduler: a diffusers scheduler. A copy of it takes the steps.
            num_inference_steps, timesteps: passed to ``scheduler.set_timesteps``; with neither, the
                scheduler's timesteps are used as they were just set.
            guidance_scale: above 1, classifier-free guidance; else none.
            guidance_rescale: as in diffusers' ``rescale_noise_cfg``.
            callback: called as ``callback(step, timestep, latents)`` after each step; may return
                other latents.
            timestep_argument: makes the denoiser's timestep argument of a scheduler's timestep, if
                it is not that itself: ``lambda t: (t / 1000).expand(batch)``.
            step_options: further arguments of ``scheduler.step``, such as ``eta``.

        Raises PlanError, SchedulerError, InputError and RankError, each saying what to change.
        """
        request = Request(
            latents,
            conditioning,
            scheduler,
            num_inference_steps,
            timesteps,
            guidance_scale,
            guidance_rescale,
            callback,
            timestep_argument,
            step_options,
        )
        with self.lock, self.own_modes():
            self.stop()
            return generate(self, request)

    def calibrate(
        self,
        latents: torch.Tensor,
        conditioning: Mapping[str, Any],
        scheduler: Any,
        *,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        timestep_argument: Callable[[torch.Tensor], torch.Tensor] | None = None,
        step_options: Mapping[str, Any] | None = None,
    ) -> Calibration:
        """Fit how waves predict clean images to this model, sampler, N, S, w and exact end, and use
        it from now on (``order``), or the default where it does not win.

        Arguments as of :meth:`generate`; ``latents`` are those of pictures of the kind that will be
        drawn, eight at least, sixteen or more better. Half of them are fitted; on the other half it
        has to win, by a margin, and else is left out (``Calibration.taken``, and a warning). Takes
        three generations, one after another, the first with every step exact
        (docs/guide/waves.md).

        Raises PlanError unless the schedule is "wavefront" and warmup a number, SchedulerError for
        a scheduler that is not linear, InputError for fewer pictures.
        """
        request = Request(
            latents,
            conditioning,
            scheduler,
            num_inference_steps,
            timesteps,
            guidance_scale,
            guidance_rescale,
            timestep_argument=timestep_argument,
            step_options=step_options,
        )
        with self.lock, self.own_modes():
            self.stop()
            found = calibrate(self, request)
            if self._team.several:  # one for all, whatever processors they compute on
                data = self._team.by(0, "calibrate", found.to_dict)
                found = Calibration.from_dict(data)
            self.configure(order=found if found.taken else None)
            return found

    def report(self) -> GenerationReport:
        """What the last finished generation did. Raises InputError if there was none."""
        if self._report is None:
            raise InputError("no generation has finished yet: there is nothing to report")
        return self._report

    def close(self) -> None:
        """Free the ranks' memory and put the module back on its device."""
        with contextlib.nullcontext() if self.forked else self.lock:
            if not self.forked:  # whose ranks are the parent's
                self.stop()
                self._engines.close()
            self._engine = None
            self._team.close()
            self._weights.restore()
