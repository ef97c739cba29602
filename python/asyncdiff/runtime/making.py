"""Makes engines: ranks for the components of a denoiser, for parts of its batch, or for shares of
its tokens."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

from ..environment import compile_workers
from ..errors import InputError
from ..graph.batch import BatchSplit
from ..graph.compiled.ahead import Compiling
from ..graph.conditions import GUIDANCE, PICTURES, batched_inputs
from ..graph.signature import Call
from ..memory import uncollected
from ..partition.partition import Partition
from ..phases import phase
from ..progress import bar
from ..quiet import keeping
from ..schedule.plan import ring
from .cfg_parallel import Groups, part
from .cutting.cutter import Cutter, Timed
from .cutting.rebalance import component_ms, foreseen
from .devices import Deployment, Place, collect
from .engine import Engine
from .pipelined import Pipelined

log = logging.getLogger("asyncdiff")


class EngineMaker:
    """Makes engines of a denoiser, at all places of its deployment or at some. ``state`` tells
    which denoiser it is by now.

    ``beside``: engines of other branches, with whose ranks those that are made at the same places
    take turns.
    """

    def __init__(self, deployment: Deployment, state: Callable[[], int]) -> None:
        self._module, self._weights = deployment.module, deployment.weights
        self._config, self._seats = deployment.config, list(deployment.seats)
        self._team = team = deployment.team
        beside = team.hosts.count(team.hosts[team.process])
        self._compiling = Compiling(
            self._config.compile, deployment.own_devices, compile_workers(), beside
        )
        self._cutter = Cutter(deployment, state, exporting=self._compiling.start)
        self.beside: list[Engine | Groups] = []

    def link_speed(self) -> float:
        """Bytes a millisecond of a link between ranks, measured once. Collective."""
        return self._cutter.links().bytes_per_ms

    def ranks(
        self,
        call: Call,
        components: int,
        places: Sequence[Place],
        split: BatchSplit | None,
        batched: Sequence[bool] | None = None,
        like: Partition | None = None,
        tokens: bool = False,
    ) -> Engine | Groups:
        """Ranks at ``places`` that run ``components`` of the denoiser, or with ``tokens`` so many
        shares of its tokens; with ``split`` an engine for each part of the batch: of conditions on
        devices of their own, of pictures in turn on all of them. ``batched``: which inputs hold all
        parts of it, if that is known. ``like``: what is to be cut alike, where that can be."""
        # Compilers leave much to free.
        lasting = uncollected() if not self._config.compile else contextlib.nullcontext()
        with contextlib.closing(self._compiling), lasting:
            if split is None:
                with self._offloading():
                    return self._even(call, components, places, like, tokens)
            return self._groups(call, components, places, split, batched, like, tokens)

    def _groups(
        self,
        call: Call,
        components: int,
        places: Sequence[Place],
        split: BatchSplit,
        batched: Sequence[bool] | None,
        like: Partition | None,
        tokens: bool,
    ) -> Engine | Groups:
        """An engine for each part of the batch; see :meth:`ranks`."""
        in_turn = self._config.schedule == "pipeline"
        ranks = len(places) if in_turn else len(places) // split.count
        if batched is None and self._weights.checkpoint is not None:
            raise InputError(
                "guidance='split', exact_mode='split' and schedule='pipeline' run the whole "
                "denoiser to find out what each part of a batch needs, and with a checkpoint no "
                "process has it: take others, or no checkpoint"
            )
        if batched is None:
            purpose = PICTURES if in_turn else GUIDANCE
            batched = self._team.by(
                0,
                "find out which inputs hold the parts of a batch",
                lambda: batched_inputs(self._module, call, split, purpose),
            )
        names = self._config.names
        mine = [part(self._module, call, names, g, batched, split) for g in range(split.count)]
        engines: list[Engine] = []
        with self._offloading(), contextlib.ExitStack() as undo:  # should memory lack for all
            for g in range(split.count):
                of_group = places if in_turn else places[g * ranks : (g + 1) * ranks]
                if not engines:
                    made = first = self._even(mine[0], components, of_group, like, tokens, places)
                else:
                    beside = first if in_turn else None
                    made = self._engine(mine[g], first.partition, of_group, beside)
                engines.append(made)
                undo.callback(made.close)
            undo.pop_all()
        return (Pipelined if in_turn else Groups)(engines, call, batched, split)

    @contextlib.contextmanager
    def _offloading(self) -> Iterator[None]:
        """Meanwhile the denoiser's weights go to host memory, if they are to, but not while times
        are taken."""
        leaving = self._weights.start_offload()
        if leaving is None:
            yield
            return
        try:
            with keeping(leaving.waiting):
                yield
        finally:
            with phase("offload"):
                self._weights.end_offload()

    def _even(
        self,
        call: Call,
        components: int,
        places: Sequence[Place],
        like: Partition | None = None,
        tokens: bool = False,
        everywhere: Sequence[Place] | None = None,
    ) -> Engine:
        """An engine, cut ``like`` another one, where there is one; else, where its components turn
        out too unequal, cut again. With ``tokens``: see :meth:`ranks`. ``everywhere``: the places
        of all groups, of which this engine is one."""
        copies = len(places) - components + 1
        parts: Partition
        if tokens and components > 1:  # else one rank has all of them
            parts = self._cutter.shards(call, components, like, everywhere or places)
        else:
            parts = self._cutter.first(call, components, copies, like, everywhere or places)
        self._weights.look(parts.captured)
        each = [e for b in self.beside for e in (b.engines if isinstance(b, Groups) else [b])]
        beside = next((e for e in each if e.places == list(places)), None)
        engine = self._engine(call, parts, places, beside)
        given = self._config.split != "auto" or like is not None
        if components == 1 or given or parts.settled:
            return engine
        timed: list[Timed] = []
        look = foreseen(parts, self._team)
        # One that was timed before is there again when a new cut is slower, or has no memory.
        while all(engine.partition is not parts for parts, _ in timed):
            times = component_ms(engine, look)
            better = None
            if times is not None:
                with phase("cut"):
                    now = [*timed, (engine.partition, times)]
                    better = self._cutter.again(now, copies)
            if look and (times is None or better is not None):
                look = False  # which is not enough to cut by
                continue
            if times is None or better is None:
                break
            timed, look = now, False
            engine.close()
            made = None
            del engine  # what it has is needed now
            collect()
            try:
                made = self._engine(call, better, places)
            except Exception as e:
                self._team.check()
                log.warning("the denoiser stays cut as it was before: %s", str(e))
            if made is None:  # only now: the exception held what was made of the engine
                collect()
                made = self._engine(call, timed[-1][0], places)
            engine = made
        return engine

    def _engine(
        self,
        call: Call,
        parts: Partition,
        places: Sequence[Place],
        beside: Engine | None = None,
    ) -> Engine:
        config, count = self._config, len(parts.components)
        with bar(config.progress) if config.compile else contextlib.nullcontext():
            return Engine(
                parts,
                places,
                self._weights,
                call.tensors,
                team=self._team,
                seats=self._seats,
                slots=ring(
                    parts.exchanges, count, config.schedule, config.extrapolate, config.delay
                ),
                extrapolate=config.extrapolate,
                deadline=config.deadline,
                compile=self._compiling if config.compile else None,
                beside=beside,
                compressed=self._cutter.compressed(parts, len(places) - count + 1),
            )
