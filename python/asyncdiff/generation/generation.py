"""One generation: its place in the plan, noise predictions held for later steps, its report."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch

from ..errors import InputError
from ..graph.signature import RESIDUALS, Call, Role, difference
from ..graph.writes import Seen, Writes
from ..phases import Spent
from ..processes.team import Team
from ..runtime.cfg_parallel import Groups
from ..runtime.devices import peak_of, simulated_link
from ..runtime.engine import Engine
from ..runtime.step import READY_NOW, Ready, Time
from ..sampling.auto_warmup import Drift
from ..sampling.calibration import Calibration, Shape
from ..sampling.clean_image import CleanImage
from ..sampling.predictor import LatePredictor, Line, Predictor, default_order
from ..schedule.actions import NOTHING, Tick
from ..schedule.branch import ONLY, Branch
from ..schedule.plan import Plan
from .phases import Phase, plan_of
from .report import GenerationReport, on_each_device
from .spec import GenerationSpec


class Generation:
    """Serves the steps of one generation, in order, from the ticks of its phases' plans.

    With ``predict`` the plans are of waves: their predictions come late, and what it makes for the
    main plan says what the sampler is given until then. ``branch``: which call in a step of the
    sampler is meant by a step. ``known``: the timesteps on the CPU, if that has them.
    """

    def __init__(
        self,
        spec: GenerationSpec,
        predict: Callable[[Plan], LatePredictor] | None = None,
        branch: Branch = ONLY,
        known: torch.Tensor | None = None,
    ) -> None:
        self.spec = spec
        self.branch = branch
        self.timesteps = timesteps = spec.timesteps
        #: the same, known to the host: to a GPU's it has to wait once, before a generation begins
        self._known = timesteps.detach().cpu() if known is None else known
        self._seen, self._writes = Seen(timesteps), Writes()
        self.steps = spec.steps
        self.engine: Engine | Groups | None = None
        self._phases: list[Phase] = []
        self.next_step = 0
        #: whether every step was served, or given up
        self.done = False
        #: whether that has been waited for
        self.finished = False
        self._held: dict[int, list[Any]] = {}
        self._predict = predict
        self._predictor: LatePredictor | None = None
        auto = spec.auto_warmup
        self._drift = None if auto is None else Drift(auto)
        #: what changes from step to step, of the calls whose waves are under way
        self._inputs: dict[int, list[torch.Tensor]] = {}

    def knows(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        """The values of these timesteps, if they are its own and were not written to."""
        mine = self._seen.tensor
        same = (
            timesteps.data_ptr() == mine.data_ptr()
            and (timesteps.shape, timesteps.stride()) == (mine.shape, mine.stride())
            and timesteps.dtype == mine.dtype
            and not (timesteps.is_inference() or mine.is_inference())
            and timesteps._version == self._seen.version
        )
        return self._known if same else None

    def begin(
        self,
        phases: Sequence[Phase],
        call: Call,
        spent: Spent,
        every: Spent,
        ready: Ready = READY_NOW,
    ) -> None:
        """Take the engines for this generation, whose steps ``phases`` serve one after another;
        ``call`` is its first. ``spent`` on preparing now, and ``every`` time for such inputs.
        Raises PlanError where a calibration is for other waves."""
        self._follow(phases)
        if self._predict is not None:
            self._predictor = self._predict(self._main.plan)
        self.engine = self._main.engine
        self._prepare_s, self._prepare_phases = spent.total, every.in_order()
        for engine in self.engines:
            engine.begin(self.steps, call.tensors, ready)
        self._started = time.perf_counter()

    def _follow(self, phases: Sequence[Phase]) -> None:
        self._phases = list(phases)
        self._ticks: dict[int, tuple[Phase, list[Tick]]] = {}
        for phase in phases:
            for tick in phase.plan.ticks:
                for step in tick.serves:
                    self._ticks.setdefault(step + phase.first, (phase, []))[1].append(tick)
        self._main = next(p for p in phases if p.main)

    def step(self, call: Call, ready: Ready = READY_NOW) -> Any:
        """The denoiser's result for the next step. Call :meth:`finish` after the last one."""
        assert self.engine is not None
        if call.signature != self.engine.signature:
            step = self.next_step
            self.abandon()
            raise InputError(
                f"the inputs changed in step {step} of a generation: "
                f"{difference(self.engine.signature, call.signature)}. Shapes, dtypes and options "
                "may change between generations only"
            )
        step = self.next_step
        if self.engine.closed:
            self._over(step)
        if self._drift is not None:
            self._settle(step, self._drift)
        if self._predictor is not None:
            leaves = self._by_waves(step, call, self._predictor, ready)
        else:
            if step not in self._held:
                self._held = self._tick(step, call, ready)
            leaves = self._held.pop(step)
        if self._drift is not None:
            self._drift.saw(step, leaves[0])
        self.next_step += 1
        self.done = self.next_step == self.steps
        return self.engine.partition.captured.unflatten(leaves)

    def _over(self, step: int) -> NoReturn:
        """Raise InputError: the ranks are gone, because of a call of another branch."""
        self.abandon()
        raise InputError(
            f"other weights were put in the place of the denoiser's between two calls of step "
            f"{step}, and its ranks had to be made anew for another call. Write into weights "
            "(copy_()), or exchange them between steps, in a callback of the pipeline "
            "(callback_on_step_end), or between generations"
        )

    def finish(self) -> None:
        """Wait for the last step, and raise what went wrong."""
        if any(engine.closed for engine in self.engines):
            self._over(self.steps - 1)
        for engine in self.engines:
            engine.finish()
        self._writes.check()
        self._total_ms = (time.perf_counter() - self._started) * 1e3
        self.finished = True

    def _settle(self, step: int, drift: Drift) -> None:
        """Decide whether ``step`` is still exact. Plans with more or fewer exact steps begin with
        the same ticks, so that another one can be followed from here."""
        if step >= self._main.plan.warmup:
            self._drift = None
        elif step > 0 and self._team.by(0, "count exact steps", lambda: drift.enough(step)):
            plan = plan_of(self.spec, self._main.engine.partition, step)
            self._follow([replace(p, plan=plan) for p in self._phases])
            self._drift = None

    def _tick(self, step: int, call: Call, ready: Ready) -> dict[int, list[Any]]:
        """Issue the tick that serves ``step``, or those of its micro-batches; the results by step
        of the generation."""
        phase, ticks = self._ticks[step]
        first = phase.first
        for tick in ticks:
            times = {index: self._time(index + first, call) for index in tick.times}
            earlier = {k: self._inputs[k + first] for k in tick.latents if k + first != step}
            phase.engine.issue(tick, call.tensors, times, earlier, ready=ready)
        results = phase.engine.results()
        return {k + first: leaves for k, leaves in results.items()} if first else results

    def _by_waves(self, step: int, call: Call, predictor: LatePredictor, ready: Ready) -> list[Any]:
        """The denoiser's outputs for a step, from the waves that have arrived."""
        names = [call.signature.inputs[i].name for i in call.indices(Role.LATENTS)]
        latents = next(i for i, n in enumerate(names) if n.split(".")[0] not in RESIDUALS)
        moving = [call.tensors[i] for i in call.indices(Role.LATENTS)]
        phase, (tick,) = self._ticks[step]
        if step == tick.serves[0] + phase.first:
            # The caller may go on to change its own.
            self._inputs[step] = [t.clone() for t in moving]
            results = self._tick(step, call, ready)
            for wave in sorted(results):
                predictor.arrived(wave, self._inputs[wave][latents], results[wave][0])
                self._held = {-1: results[wave]}
            oldest = step - self._main.plan.delay * self._main.plan.stride
            self._inputs = {k: v for k, v in self._inputs.items() if k > oldest}
            if tick.exact:
                exact, *further = results[step]
                return [predictor.exact(step, moving[latents], exact), *further]
        # Further outputs, where a denoiser has any, are those of the newest wave.
        newest = self._held[-1]
        prediction = predictor.predict(step, moving[latents], newest[0].dtype)
        return [prediction, *newest[1:]]

    def abandon(self, cause: BaseException | None = None) -> None:
        """Give up what is left; ``cause``: see :meth:`asyncdiff.runtime.engine.Engine.abandon`."""
        if self.engine is not None and not self.finished:
            for engine in self.engines:
                engine.abandon(cause)
        self.done = True

    def _time(self, index: int, call: Call) -> Time:
        """The timestep argument at an index: that of the call for its own step, else as announced.
        It is a number where the host can know that without asking a GPU."""
        where = call.indices(Role.TIMESTEP)
        if not where:
            return None
        now = call.tensors[where[0]]
        if index == self.next_step and not self._announced(now, index):
            return _number(now)
        time = _number(self._known[index].to(now.dtype))
        if isinstance(time, torch.Tensor):  # each sample has its own
            return self.timesteps[index].to(now.dtype).expand(now.shape)
        return time

    def _announced(self, now: torch.Tensor, index: int) -> bool:
        """Whether an argument is, without looking at its value, the announced timestep: the same
        memory, not written to since (:mod:`~asyncdiff.graph.writes`)."""
        times, values = self.timesteps, self._seen.value
        is_view = (
            (now.device, now.dtype, 1) == (times.device, times.dtype, times.dim())
            and now.data_ptr() == times[index].data_ptr()
            and all(
                size == 1 or step == 0 for size, step in zip(now.shape, now.stride(), strict=True)
            )
        )
        if not is_view or values is None:
            return is_view and times._version == self._seen.version
        return self._writes.unchanged(times[index], values[index])

    def report(self) -> GenerationReport:
        """What this generation did; call it once it is finished."""
        assert self.engine is not None
        engine, plan = self.engine, self._main.plan
        ticks = [tick for phase in self._phases for tick in phase.plan.ticks]
        sent = [nbytes for phase in self._phases for nbytes in _sent(phase)]
        every = self.spec.config.schedule == "sequence"
        steady = [b for tick, b in zip(ticks, sent, strict=True) if every or not tick.exact]
        exposed = engine.exposed_ms()
        return GenerationReport(
            components=self.spec.config.components,
            stride=self.spec.config.stride,
            warmup=self._main.first + plan.warmup,
            devices=[str(p) for p in engine.places],
            steps=self.steps,
            ticks=len(ticks),
            total_ms=self._total_ms,
            prepare_s=self._prepare_s,
            prepare_phases=self._prepare_phases,
            exchange_bytes=sum(sent),
            exchange_bytes_per_tick=max(steady, default=0),
            exposed_ms=None if exposed is None else exposed * len(plan.ticks),
            exposed_ms_per_tick=exposed,
            cuda_graphs=all(w.graphs.used for w in engine.workers),
            compiled=all(w.program.compiled for w in engine.workers),
            compile_s=engine.compile_s,
            settings=self.spec.config.to_dict(),
            speeds=list(engine.partition.speeds),
            memory=_memory(self.engines),
            simulated_link=simulated_link(),
        )

    @property
    def _team(self) -> Team:
        return self._main.engine.team

    @property
    def engines(self) -> list[Engine | Groups]:
        """Every engine once; none before the first step."""
        return list({id(p.engine): p.engine for p in self._phases}.values())


def _memory(engines: Sequence[Engine | Groups]) -> list[dict[str, Any]]:
    """What engines need of each device, and what torch has had there."""
    every = [e for each in engines for e in (each.engines if isinstance(each, Groups) else [each])]
    entries: list[list[dict[str, Any]]] = []
    for engine in every:
        uses, mine = engine.partition.memory(), []
        for rank, place in enumerate(engine.places):
            use = uses[min(rank, len(uses) - 1)]
            own = place.process == engine.team.process
            mine.append(
                {
                    "device": str(place) if own else f"{place} of process {place.process}",
                    "weights_bytes": use.weights,
                    "estimated_bytes": use.total,
                    "peak_bytes": peak_of(place.device) if own else None,
                }
            )
        # Ranks of one device have other weights each, but for the copies of a stride.
        count = len(engine.partition.components)
        entries.append(on_each_device([mine[:count]], shared=False) + mine[count:])
    return on_each_device(entries, shared=True)


def predictor_of(spec: GenerationSpec, clean: CleanImage, plan: Plan) -> Predictor:
    """What says what a step of waves is given meanwhile. Raises PlanError where the calibration is
    for others."""
    config, rule = spec.config, spec.config.order
    if isinstance(rule, Calibration) and not rule.taken:
        rule = None
    if isinstance(rule, Calibration):
        shape = Shape(config.components, config.stride, plan.delay, spec.warmup, spec.exact_tail)
        rule.check(shape, clean)
        return Predictor(clean, rule, plan.delay, config.stride)
    order = default_order(clean, plan.delay, config.stride) if rule is None else rule
    return Predictor(clean, Line(order), plan.delay, config.stride)


def _number(time: torch.Tensor) -> Time:
    """A timestep as a number, if the host has it and all elements are alike; else itself."""
    if time.device.type != "cpu" or time.numel() == 0:
        return time
    first = time.reshape(-1)[0]
    return first.item() if bool((time == first).all()) else time


def _sent(phase: Phase) -> list[int]:
    """Bytes of boundaries, or of tokens, that ranks send to others, tick by tick."""
    by_component: dict[tuple[int, bool], int] = defaultdict(int)
    for exact in (True, False):
        for (source, target), nbytes in phase.engine.bundle_bytes(exact).items():
            by_component[source, exact] += nbytes * len(phase.plan.ranks_of(target))
    inside = phase.plan.schedule == "sequence"  # of each run
    return [
        sum(
            by_component[run.component, tick.exact]
            for run in tick.runs
            if inside or run.ordinal != NOTHING
        )
        for tick in phase.plan.ticks
    ]
