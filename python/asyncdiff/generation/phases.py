"""Who serves which steps of a generation: engines, each with a plan of its own."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ..graph.signature import Call
from ..partition.partition import Partition
from ..runtime.cfg_parallel import Groups
from ..runtime.engine import Engine
from ..runtime.engine_cache import EngineCache
from ..runtime.pipelined import Pipelined
from ..schedule.branch import ONLY, Branch
from ..schedule.plan import Plan, build
from .spec import GenerationSpec


@dataclass(frozen=True)
class Phase:
    """Steps that one engine serves, by a plan of its own: ``plan.steps`` from ``first`` on.
    ``main``: the one that a generation is about; others are exact steps run in another way."""

    engine: Engine | Groups
    plan: Plan
    first: int = 0
    main: bool = True


#: Of a generation like the one before, the plan is the same object: nothing is prepared again.
_build = functools.lru_cache(maxsize=16)(build)


def plan_of(
    spec: GenerationSpec,
    parts: Partition | None,
    warmup: int | None = None,
    microbatches: int | None = None,
) -> Plan:
    """The plan of a generation, for each group of ranks; without the exact steps that run on
    devices with the whole denoiser, by ``exact_mode``. ``warmup``: with this many exact steps.
    ``parts`` tells which components exchange (None: not known yet; each sends to all later ones).
    ``microbatches``: of a pipeline (None: not known yet)."""
    config = spec.config
    before, after = spec.split_steps
    if before == spec.steps:
        return _exact(before, config.ranks if config.exact_mode == "sequence" else 1)
    return _build(
        config.components,
        config.stride,
        (spec.warmup if warmup is None else warmup) - before,
        spec.steps - before - after,
        schedule=config.schedule,
        exact_tail=spec.exact_tail - after,
        time_shift=config.time_shift,
        extrapolate=config.extrapolate,
        delay=config.delay,
        microbatches=microbatches,
        exchanges=parts.exchanges if parts else None,
        exact_order=parts.exact_order if parts else None,
    )


def phases_of(
    spec: GenerationSpec,
    engines: EngineCache,
    engine: Engine | Groups,
    call: Call,
    branch: Branch = ONLY,
) -> list[Phase]:
    """The phases of a generation of calls like this one, which ``engine`` was got for, with every
    CUDA graph recorded."""
    before, after = spec.split_steps

    def whole(steps: int, first: int = 0, main: bool = True) -> Phase:
        made = engines.whole(call, branch, spec.config.exact_mode)
        return Phase(made, _exact(steps, len(made.partition.components)), first, main)

    if before == spec.steps:
        phases = [whole(before)]
        engines.prepare(phases[0].engine, phases[0].plan)
        return phases
    count = engine.microbatches if isinstance(engine, Pipelined) else None
    phases = [Phase(engine, plan_of(spec, engine.partition, microbatches=count), before)]
    if before:
        phases.insert(0, whole(before, main=False))
    if after:
        first = spec.steps - after
        phases.append(whole(after, first, main=False))
    for phase in phases:
        engines.prepare(phase.engine, phase.plan)
    if spec.auto_warmup is not None:  # whenever exact steps end, nothing is to be recorded then
        for warmup in range(1, spec.warmup):
            engines.prepare(engine, plan_of(spec, engine.partition, warmup))
    return phases


def _exact(steps: int, ranks: int = 1) -> Plan:
    """The plan of exact steps on ranks that have the whole denoiser: of each condition one, or
    several that share out its tokens."""
    return _build(ranks, 1, steps, steps, schedule="sequence", exchanges=())
