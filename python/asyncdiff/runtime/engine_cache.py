"""Engines made ready for calls of one signature, and kept for later calls like them, as long as the
denoiser stays what it was."""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from ..config import GROUPS, ParallelConfig
from ..graph.batch import BatchSplit
from ..graph.capture import capture
from ..graph.conditions import GUIDANCE, PICTURES, batched_inputs
from ..graph.hooks import check_hooks
from ..graph.module_state import ModuleState
from ..graph.signature import Call, Role, Signature
from ..graph.weights import Weights
from ..graph.writes import WeightWatch
from ..partition.cost import fused, link_speed, measure
from ..partition.partition import Partition, partition
from ..progress import bar
from ..schedule.plan import Plan, ring
from .cfg_parallel import Groups, part
from .cuda_graphs import reason
from .devices import collect, out_of_memory
from .engine import Engine
from .pipelined import Pipelined, split_of
from .rebalance import WORTH, WORTH_COMPILING, component_ms, next_cut

log = logging.getLogger("asyncdiff")

#: Kinds of calls whose engines are kept. Each engine holds mailboxes and graphs.
_KEPT = 4
#: A guided batch that is cut into its conditions.
_CONDITIONS = BatchSplit(1, GROUPS)

#: The signature of a call, what the denoiser was then (:class:`~.module_state.ModuleState`), and
#: how the batch is cut, if it is cut.
_Kind = tuple[Signature, int, BatchSplit | None]
_T = TypeVar("_T")


@dataclass
class _Prepared:
    """What is kept for calls of one kind: the engine of the components, what tells of writes to its
    weights, and maybe the engine of two devices that have the whole denoiser."""

    engine: Engine | Groups
    watch: WeightWatch
    whole: Engine | Groups | None = None

    @property
    def engines(self) -> list[Engine | Groups]:
        return [self.engine] if self.whole is None else [self.engine, self.whole]


class EngineCache:
    """The engines of one denoiser, by kind of the call."""

    def __init__(
        self,
        module: nn.Module,
        weights: Weights,
        devices: Sequence[torch.device],
        config: ParallelConfig,
    ) -> None:
        self._module = module
        self._state = ModuleState(module)
        #: the denoiser's state when an engine was asked for last
        self._number = 0
        self._weights = weights
        self._devices = list(devices)
        self._config = config
        #: those that were asked for last are at the end
        self._kept: OrderedDict[_Kind, _Prepared] = OrderedDict()
        self._bytes_per_ms: float | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def changed(self) -> bool:
        """Whether the denoiser, or a weight of it, is not what it was when an engine was asked for
        last."""
        if self._state.number() != self._number:
            return True
        return self._kept[next(reversed(self._kept))].watch.changed()

    def get(self, call: Call) -> Engine | Groups:
        """The engine of the components, for calls like this one. Raises InputError for a denoiser
        with hooks."""
        check_hooks(self._module)
        kind = self._kind(call)
        self._renew(kind)
        if kind not in self._kept:
            config = self._config
            self._drop(list(self._kept)[: max(0, len(self._kept) + 1 - _KEPT)])  # for its memory
            with bar(config.progress):
                made = self._with_room(
                    lambda: self._team(call, config.components, self._devices, kind[2])
                )
            kind = self._kind(call)  # capturing runs the denoiser, which may keep something
            self._drop([k for k in self._kept if k == kind])
            watch = WeightWatch(made.partition.captured.weights.values())
            self._kept[kind] = _Prepared(made, watch)
        self._kept.move_to_end(kind)
        self._number = kind[1]
        return self._kept[kind].engine

    def _renew(self, kind: _Kind) -> None:
        """Give the engines of a kind what its weights are now, if they were written to; drop the
        engines where they have to be made anew for that."""
        kept = self._kept.get(kind)
        if kept is None or not kept.watch.changed():
            return
        captured = [engine.partition.captured for engine in kept.engines]
        if not all(self._weights.renew(c) for c in captured):
            self._drop([kind])
            return
        log.info("weights were written to: ranks have their new values")
        for engine in kept.engines:
            engine.forget()
        kept.watch = WeightWatch(captured[0].weights.values())

    def _kind(self, call: Call) -> _Kind:
        return call.signature, self._state.number(), self._split(call)

    def _split(self, call: Call) -> BatchSplit | None:
        """How the components' engines cut the batch."""
        config = self._config
        if config.schedule == "pipeline":
            return split_of(call, call.indices(Role.LATENTS)[0], config.components)
        return _CONDITIONS if config.guidance == "split" else None

    def whole(self, call: Call) -> Engine | Groups:
        """The engine of two devices that have the whole denoiser, a condition each. Only after
        :meth:`get` for the same call."""
        kind = next(reversed(self._kept))
        kept = self._kept[kind]
        if kept.whole is None:
            first = self._devices[0]
            devices = [first, next((d for d in self._devices if d != first), first)]
            known = kept.engine.batched if isinstance(kept.engine, Groups) else None
            kept.whole = self._with_room(
                lambda: self._team(call, 1, devices, _CONDITIONS, known), kind
            )
        return kept.whole

    def prepare(self, engine: Engine | Groups, plan: Plan) -> None:
        """Make an engine of the calls that were asked for last ready for ``plan``."""
        self._with_room(lambda: engine.prepare(plan), next(reversed(self._kept)))

    def close(self) -> None:
        """Free all engines."""
        self._drop(list(self._kept))

    def _drop(self, kinds: Sequence[_Kind]) -> None:
        for kind in kinds:
            for engine in self._kept.pop(kind).engines:
                engine.close()
        if kinds and self._devices[0].type == "cuda":
            collect()

    def _with_room(self, work: Callable[[], _T], mine: _Kind | None = None) -> _T:
        """What ``work`` for calls of ``mine`` returns; should there be no memory for it, it is done
        again without the engines of all other calls. Raises what it raises the second time."""
        try:
            return work()
        except Exception as e:
            others = [k for k in self._kept if k != mine]
            if not others or not out_of_memory(e):
                raise
            log.warning(
                "there is no memory for one more kind of calls (%s): what was prepared for the "
                "%d others is dropped",
                reason(e),
                len(others),
            )
        # Only now: the exception holds what was half made.
        self._drop(others)
        return work()

    def _team(
        self,
        call: Call,
        components: int,
        devices: Sequence[torch.device],
        split: BatchSplit | None,
        batched: Sequence[bool] | None = None,
    ) -> Engine | Groups:
        """Ranks on ``devices`` that run ``components`` of the denoiser; with ``split`` an engine
        for each part of the batch: of conditions on devices of their own, of pictures in turn on
        all of them. ``batched``: which inputs hold all parts of it, if that is known."""
        if split is None:
            return self._even(call, components, devices)
        in_turn = self._config.schedule == "pipeline"
        ranks = len(devices) if in_turn else len(devices) // split.count
        if batched is None:
            purpose = PICTURES if in_turn else GUIDANCE
            batched = batched_inputs(self._module, call, split, purpose)
        names = self._config.names
        mine = [part(self._module, call, names, g, batched, split) for g in range(split.count)]
        engines: list[Engine] = []
        with contextlib.ExitStack() as undo:  # should there be no memory for all of them
            for g in range(split.count):
                of_group = devices if in_turn else devices[g * ranks : (g + 1) * ranks]
                if not engines:
                    made = first = self._even(mine[0], components, of_group)
                else:
                    beside = first if in_turn else None
                    made = self._engine(mine[g], first.partition, of_group, beside)
                engines.append(made)
                undo.callback(made.close)
            undo.pop_all()
        return (Pipelined if in_turn else Groups)(engines, call, batched, split)

    def _even(self, call: Call, components: int, devices: Sequence[torch.device]) -> Engine:
        """An engine; where its components turn out too unequal, one that is cut again."""
        copies = len(devices) - components + 1
        engine = self._engine(call, self._partition(call, components, copies), devices)
        if components == 1 or self._config.split != "auto":
            return engine
        assert self._bytes_per_ms is not None
        worth = WORTH_COMPILING if self._config.compile else WORTH
        timed: list[tuple[Partition, list[float]]] = []
        # One that was timed before is there again when a new cut is slower, or has no memory.
        while all(engine.partition is not parts for parts, _ in timed):
            times = component_ms(engine)
            if times is None:
                break
            timed.append((engine.partition, times))
            better = next_cut(timed, self._bytes_per_ms, copies, worth)
            if better is None:
                break
            engine.close()
            made = None
            del engine  # what it has is needed now
            collect()
            try:
                made = self._engine(call, better, devices)
            except Exception as e:
                log.warning("the denoiser stays cut as it was before: %s", str(e))
            if made is None:  # only now: the exception held what was made of the engine
                collect()
                made = self._engine(call, timed[-1][0], devices)
            engine = made
        return engine

    def _engine(
        self,
        call: Call,
        parts: Partition,
        devices: Sequence[torch.device],
        beside: Engine | None = None,
    ) -> Engine:
        config, count = self._config, len(parts.components)
        with bar(config.progress) if config.compile else contextlib.nullcontext() as progress:
            return Engine(
                parts,
                devices,
                self._weights,
                call.tensors,
                slots=ring(
                    parts.exchanges, count, config.schedule, config.extrapolate, config.delay
                ),
                extrapolate=config.extrapolate,
                deadline=config.deadline,
                compile=progress,
                beside=beside,
            )

    def _partition(self, call: Call, components: int, copies: int) -> Partition:
        config = self._config
        captured = capture(self._module, call)
        split = config.split if components == config.components else "auto"
        costs = None
        if self._bytes_per_ms is None:
            self._bytes_per_ms = link_speed(self._devices)
        if split == "auto" and components > 1:
            costs = measure(captured, call.tensors, self._devices[0])
            if config.compile:
                costs = fused(captured, costs)
        speed = self._bytes_per_ms
        return partition(
            captured, components, split, costs=costs, bytes_per_ms=speed, copies=copies
        )
