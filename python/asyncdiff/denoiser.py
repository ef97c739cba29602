"""A denoiser spread over several ranks: the front of the engine, without diffusers."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from .deadline import check_deadline
from .errors import InputError, PlanError, SchedulerError
from .generate import Callback, Request, calibrate, generate
from .generation import Generation, GenerationReport, Phase
from .graph.compile import pays
from .graph.signature import Call, Parser, check_devices, check_one_latents
from .graph.weights import Weights
from .partition.ownership import Split, check_split_argument
from .partition.partition import Partition
from .progress import Progress
from .runtime import devices as device_list
from .runtime.cfg_parallel import GROUPS, Groups
from .runtime.engine import Engine
from .runtime.engine_cache import EngineCache, EngineConfig
from .runtime.forking import Locked
from .sampling.auto_warmup import AutoWarmup, Drift
from .sampling.calibration import Calibration, Shape
from .sampling.clean_image import CleanImage, clean_image
from .sampling.linear import Samplers
from .sampling.predictor import LatePredictor, Line, Predictor, Rule, check_order, default_order
from .schedule.plan import Plan, build, check_delay, check_numbers, check_schedule, rank_count

log = logging.getLogger("asyncdiff")

#: More steps than any generation has, where their number is not known yet.
_MANY = 1_000_000


class AsyncDenoiser(Locked):
    """``module`` split into components that run on several devices at once.

    Args:
        module: a denoiser in eval mode; any module that torch.export can export.
        example_args, example_kwargs: a call of it. With one, everything is prepared now; without,
            at the first call.
        devices: one entry a rank (N + S − 1; waves: N; twice that with guidance="split"), which
            may repeat; None for all GPUs, else the CPU.
        components, stride, warmup, time_shift: N, S, w and the time shift of the schedule. A warmup
            of "auto", or an :class:`asyncdiff.AutoWarmup`, ends when the denoiser's output changes
            less from step to step than it did.
        split: ``"auto"`` (node costs measured on the first device; where every component has a GPU
            of its own they are then timed, and cut again if that makes the slowest faster),
            ``"estimate"`` (from FLOPs and bytes, the same on every machine), one list of module
            paths for each component, or the ``partition.cuts`` of an earlier run.
        latents, timestep: names of those arguments, where they are not the usual ones.
        schedule: ``"asyncdiff"``, as published, or ``"wavefront"``: an evaluation passes through
            the components in successive ticks, and the sampler goes on with an extrapolated clean
            image until it arrives (docs/guide/waves.md).
        delay: of waves only: ticks until a wave's prediction arrives, from 1 to N − 1; with N − 1
            nothing inside a wave is stale. None for what measured best: 1 where the first component
            sends to the last one, as in UNets, N − 1 in a chain of components.
        order: of waves only: how far the clean image is extrapolated, from 0 (held) to 1 (in a
            straight line); None for what measured best for N and S; or what :meth:`calibrate` or
            ``Calibration.load`` returned.
        exact_tail: the last so many steps are run exactly, like the first w.
        extrapolate: of ``"asyncdiff"`` only: by how much of their last change (0 to 2) the values
            of other components are moved on before they are used.
        guidance: "batched" (every rank takes both conditions of a guided batch), or "split": the
            first half of the ranks takes the first condition, the others the second one.
        warmup_mode: "chain" (exact steps run one component after another), or "split": the exact
            steps but the last of the first ones run whole on two devices, a condition each. Those
            hold the whole denoiser then.
        compile: compile the components with inductor, which takes a minute or so for inputs of a
            new shape, up to four where components turn out unequal (results are cached on the disk,
            where torch keeps them) and makes a step a third faster; None for denoisers of at least
            100 million parameters on GPUs.
        progress: called with (what, done, of how many) while components are compiled; None for a
            bar where stderr is a terminal.
        deadline: seconds after which a rank that waits for another gives up; None takes
            ``ASYNCDIFF_DEADLINE``, else 10.

    Calls happen inside a generation::

        with denoiser.generation(timesteps):
            for t in timesteps:
                noise = denoiser(latents, t, encoder_hidden_states=text)
                latents = ...

    ``warmup``, ``warmup_mode``, ``exact_tail`` and ``order`` may be assigned between generations.
    Generations of several threads run one after another. Each takes the weights as they are when
    it begins, also where they were written to since the last one.

    Raises PlanError, PartitionError, DeviceError, CaptureError and InputError, each saying what
    to change.
    """

    def __init__(
        self,
        module: nn.Module,
        example_args: Sequence[Any] = (),
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        devices: device_list.Devices = None,
        components: int = 2,
        stride: int = 1,
        warmup: int | str | AutoWarmup = 1,
        split: Split = "auto",
        time_shift: bool = False,
        latents: str | None = None,
        timestep: str | None = None,
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
    ) -> None:
        self.warmup = warmup
        self.exact_tail = exact_tail
        check_schedule(
            schedule, time_shift=time_shift, extrapolate=extrapolate, exact_tail=exact_tail
        )
        check_numbers(components, stride, self.exact_steps(_MANY))
        check_delay(delay, schedule, components)
        check_order(order, schedule)
        check_split_argument(module, split, components)
        ranks = rank_count(components, stride, schedule)
        _check_modes(guidance, warmup_mode, ranks, self.auto_warmup)
        if guidance == "split":
            why = f"2 x {'components' if schedule == 'wavefront' else '(components + stride - 1)'}"
            self.devices = device_list.resolve(devices, GROUPS * ranks, why)
        else:
            self.devices = device_list.resolve(devices, ranks)
        self.module = module
        self.components = components
        self.stride = stride
        self.split = split
        self.time_shift = time_shift
        self.schedule = schedule
        self.delay = delay
        self.order = order
        self.extrapolate = extrapolate
        self.guidance = guidance
        self.warmup_mode = warmup_mode
        self.progress = progress
        self.compile = pays(module, self.devices) if compile is None else compile
        self.names = {"latents": latents, "timestep": timestep}
        self._parser = Parser(module, latents, timestep)
        #: linear schedulers, whose waves can be calibrated
        self.samplers = Samplers()
        self._weights = Weights(module)
        making = EngineConfig(
            self.devices,
            self.names,
            components,
            split,
            guidance,
            schedule,
            delay,
            extrapolate,
            self.compile,
            progress,
            check_deadline(deadline),
        )
        self._engines = EngineCache(module, self._weights, making)
        self._engine: Engine | Groups | None = None
        super().__init__()  # the lock, held by whoever runs a generation
        self._generation: Generation | None = None
        self._report: GenerationReport | None = None
        if self.compile and self.devices[0].type == "cuda":
            self._weights.channels_last()
        if any(d != self._weights.home for d in self.devices):
            self._weights.offload()
        if example_args or example_kwargs:
            self.prepare(*example_args, **dict(example_kwargs or {}))

    # ---- preparation -------------------------------------------------------------------------

    @property
    def home(self) -> torch.device:
        """The device on which a sampler's tensors belong."""
        cuda = self.devices[0].type == "cuda"
        return (
            self._weights.home if cuda == (self._weights.home.type == "cuda") else self.devices[0]
        )

    @property
    def partition(self) -> Partition:
        """How the denoiser is split for the inputs seen last."""
        if self._engine is None:
            raise InputError("nothing was captured yet: run the denoiser once, or call prepare()")
        return self._engine.partition

    @property
    def splits(self) -> bool:
        """Whether conditions are ever split over groups of ranks."""
        return self.guidance == "split" or self.warmup_mode == "split"

    @property
    def auto_warmup(self) -> AutoWarmup | None:
        """What decides about exact steps, if their number is not fixed."""
        if self.warmup == "auto":
            return AutoWarmup()
        return self.warmup if isinstance(self.warmup, AutoWarmup) else None

    def exact_steps(self, steps: int) -> int:
        """With how many exact steps a generation of ``steps`` begins; the most, if that is open."""
        auto = self.auto_warmup
        if auto is not None:
            return auto.bound(steps, self.exact_tail)
        return cast(int, self.warmup)  # or what check_numbers refuses

    def plan(self, steps: int, *, warmup: int | None = None) -> Plan:
        """The plan of a generation with this many steps, for each group of ranks; with
        warmup_mode="split" without the exact steps that run split. ``warmup``: with this many exact
        steps."""
        warmup = self.exact_steps(steps) if warmup is None else warmup
        check_numbers(self.components, self.stride, warmup, steps, self.exact_tail)
        order = self._engine.partition if self._engine else None
        before, after = self._split_steps
        return _build(
            self.components,
            self.stride,
            warmup - before,
            steps - before - after,
            schedule=self.schedule,
            exact_tail=self.exact_tail - after,
            time_shift=self.time_shift,
            extrapolate=self.extrapolate,
            delay=self.delay,
            exchanges=order.exchanges if order else None,
            exact_order=order.exact_order if order else None,
        )

    def prepare(self, *args: Any, steps: int | None = None, **kwargs: Any) -> None:
        """Capture, split and place the denoiser for calls like this one.

        ``steps``: also record the CUDA graphs of a generation with so many steps.
        """
        with self.lock, self.own_modes():
            call = self.parse(args, kwargs)
            self._check(call)
            used = self._generation.engine if self._generation and self.active else None
            if used is not None and not self.fits(call):
                raise InputError(
                    "a generation with other inputs or options is under way, whose engine may "
                    "have to make room: prepare before it or after it"
                )
            self._prepared(call)
            if steps is not None:
                self._phases(call, steps)

    def parse(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """A call of the denoiser, taken apart; raises InputError where it does not fit."""
        return self._parser(args, kwargs)

    @property
    def _split_steps(self) -> tuple[int, int]:
        """Exact steps at both ends that run split. The last one of the warm-up fills the mailboxes:
        it runs as a chain."""
        if self.warmup_mode == "chain":
            return 0, 0
        return cast(int, self.warmup) - 1, self.exact_tail

    def _phases(self, call: Call, steps: int) -> list[Phase]:
        """Who serves which steps of calls like this one, with every CUDA graph recorded."""
        before, after = self._split_steps
        engine = self._prepared(call)
        phases = [Phase(engine, self.plan(steps), before)]
        if before:
            phases.insert(0, Phase(self._engines.whole(call), _exact(before), main=False))
        if after:
            tail = Phase(self._engines.whole(call), _exact(after), steps - after, main=False)
            phases.append(tail)
        for phase in phases:
            self._engines.prepare(phase.engine, phase.plan)
        if self.auto_warmup is not None:  # whenever exact steps end, nothing is to be recorded then
            for warmup in range(1, phases[0].plan.warmup):
                self._engines.prepare(engine, self.plan(steps, warmup=warmup))
        return phases

    def _check_steps(self, steps: int) -> None:
        ranks = rank_count(self.components, self.stride, self.schedule)
        _check_modes(self.guidance, self.warmup_mode, ranks, self.auto_warmup)
        warmup = self.exact_steps(steps)
        check_numbers(self.components, self.stride, warmup, steps, self.exact_tail)

    def _check(self, call: Call) -> None:
        check_devices(call, self.devices[0].type == "cuda")

    @contextlib.contextmanager
    def own_modes(self) -> Iterator[None]:
        """Without the caller's modes: what ranks keep is written to outside of inference mode, too,
        and has no gradient; a captured denoiser's dtypes are those of its weights."""
        kind = self.devices[0].type
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(kind, enabled=False):
            yield

    def _prepared(self, call: Call) -> Engine | Groups:
        if self.schedule == "wavefront" or self.splits:
            check_one_latents(call)
        self._engine = self._engines.get(call)
        return self._engine

    # ---- generations -------------------------------------------------------------------------

    @contextlib.contextmanager
    def generation(
        self, timesteps: Sequence[Any] | torch.Tensor, scheduler: Any = None
    ) -> Iterator[Generation]:
        """A generation whose k-th call has ``timesteps[k]`` as the denoiser's timestep argument.

        ``scheduler``: the diffusers scheduler that takes the steps, its timesteps set; the last
        step is its last. Waves need it, to tell clean images.

        Raises PlanError where warmup exceeds the number of steps, SchedulerError where waves have
        no scheduler, or one whose α and σ cannot be had.
        """
        with self.lock:
            clean = None
            if self.schedule == "wavefront":
                if scheduler is None:
                    raise SchedulerError(
                        "schedule='wavefront' has to know α and σ of every step: pass the "
                        "scheduler, generation(timesteps, scheduler)"
                    )
                whole = clean_image(scheduler)
                steps = len(timesteps)
                clean = whole.of_steps(len(whole.of_input) - steps, steps)
            self.start(timesteps, clean)
            assert self._generation is not None
            try:
                yield self._generation
            finally:
                self.stop()

    def start(
        self,
        timesteps: Sequence[Any] | torch.Tensor,
        clean: CleanImage | None = None,
        predict: Callable[[Plan], LatePredictor] | None = None,
    ) -> None:
        """Begin a generation, giving up an unfinished one. Prefer :meth:`generation`.

        ``clean`` tells the clean images of these steps; waves need it, or ``predict``, which makes
        what says what a step is given before its prediction arrives.
        """
        self._check_steps(len(timesteps))
        with self.lock:
            self.stop()
            if predict is None and self.schedule == "wavefront":
                assert clean is not None
                predict = functools.partial(self._predictor, clean)
            auto = self.auto_warmup
            drift = None if auto is None else Drift(auto)
            self._generation = Generation(torch.as_tensor(timesteps), predict, drift)

    def _predictor(self, clean: CleanImage, plan: Plan) -> Predictor:
        return Predictor(clean, self.rule_of(clean, plan))

    def rule_of(self, clean: CleanImage, plan: Plan) -> Rule:
        """How waves of this plan predict the clean images of these steps. Raises PlanError where
        the calibration is for others."""
        if isinstance(self.order, Calibration):
            steps = self.exact_steps(len(clean.alpha))
            shape = Shape(self.components, self.stride, plan.delay, steps, self.exact_tail)
            self.order.check(shape, clean)
            return self.order
        if self.order is None:
            return Line(default_order(clean, plan.delay, self.stride))
        return Line(self.order)

    def stop(self) -> None:
        """Give up the current generation, if one is unfinished."""
        with self.lock:
            if self._generation is not None:
                self._generation.abandon()
                self._generation = None

    @property
    def active(self) -> bool:
        """Whether a generation has steps left."""
        return self._generation is not None and not self._generation.done

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One step of the current generation: what ``module(*args, **kwargs)`` returns."""
        return self.call(self.parse(args, kwargs))

    @property
    def step(self) -> int:
        """Index of the next step of the current generation; 0 without one."""
        return 0 if self._generation is None else self._generation.next_step

    def fits(self, call: Call, *, options: bool = True) -> bool:
        """Whether the generation under way can go on with this call: inputs of the same shapes,
        dtypes and constants as before and, with ``options``, of a denoiser whose options are what
        they were when it began."""
        with self.lock:
            engine = None if self._generation is None else self._generation.engine
            if engine is None:
                return True
            return call.signature == engine.signature and not (options and self._engines.changed())

    @contextlib.contextmanager
    def at_most(self, steps: int) -> Iterator[None]:
        """For the beginning of a generation with so few steps that the exact ones may be more: all
        of them are exact then."""
        kept = self.warmup, self.exact_tail
        if self.exact_steps(steps) + self.exact_tail > steps:
            self.warmup, self.exact_tail = steps, 0
        try:
            yield
        finally:
            self.warmup, self.exact_tail = kept

    def call(self, call: Call) -> Any:
        """:meth:`__call__` for a call that :func:`asyncdiff.graph.signature.parse` took apart."""
        with self.lock, self.own_modes():
            self._check(call)
            generation = self._generation
            if generation is None or generation.done:
                raise InputError(
                    "no generation has steps left: call the denoiser inside "
                    "`with denoiser.generation(timesteps):`, once for each timestep"
                )
            if generation.engine is None:
                started = time.perf_counter()
                phases = self._phases(call, generation.steps)
                generation.begin(
                    phases,
                    call,
                    time.perf_counter() - started,
                    lambda warmup: self.plan(generation.steps, warmup=warmup),
                )
            try:
                result = generation.step(call)
            except BaseException:
                self._generation = None
                raise
            if generation.done:
                self._report = generation.report()
            return result

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
            dict(step_options or {}),
        )
        with self.lock:
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
        it from now on (``order``).

        Arguments as of :meth:`generate`; ``latents`` are those of a few pictures of the kind that
        will be drawn, eight or more, two at least. Takes five generations of them, one after
        another, the first with every step exact. It gains most where steps are large
        (docs/guide/waves.md), and is not worse than the default on the pictures that it was judged
        by.

        Raises PlanError unless the schedule is "wavefront" and warmup a number, SchedulerError for
        a scheduler that is not linear, InputError for a single picture.
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
            step_options=dict(step_options or {}),
        )
        with self.lock:
            self.stop()
            self.order = calibrate(self, request)
            return self.order

    def report(self) -> GenerationReport:
        """What the last finished generation did. Raises InputError if there was none."""
        if self._report is None:
            raise InputError("no generation has finished yet: there is nothing to report")
        return self._report

    def close(self) -> None:
        """Free the ranks' memory and put the module back on its device."""
        if self.forked:  # whose ranks are the parent's
            self._generation = self._engine = None
            self._weights.restore()
            return
        with self.lock:
            self.stop()
            self._engines.close()
            self._engine = None
            self._weights.restore()


#: Of a generation like the one before, the plan is the same object: nothing is prepared again.
_build = functools.lru_cache(maxsize=16)(build)


def _exact(steps: int) -> Plan:
    """The plan of exact steps on a rank that has the whole denoiser."""
    return _build(1, 1, steps, steps, exchanges=())


def _check_modes(
    guidance: str, warmup_mode: str, ranks: int, auto_warmup: AutoWarmup | None
) -> None:
    if guidance not in ("batched", "split"):
        raise InputError(f"guidance={guidance!r}: write 'batched' or 'split'")
    if warmup_mode not in ("chain", "split"):
        raise InputError(f"warmup_mode={warmup_mode!r}: write 'chain' or 'split'")
    if warmup_mode == "split" and auto_warmup is not None:
        raise PlanError(
            "warmup='auto' needs warmup_mode='chain': the last exact step, which fills the "
            "mailboxes, is not known ahead"
        )
    if warmup_mode == "split" and guidance == "batched" and ranks < GROUPS:
        raise PlanError(
            "warmup_mode='split' needs two ranks: take components >= 2 or stride >= 2, or "
            "warmup_mode='chain'"
        )
