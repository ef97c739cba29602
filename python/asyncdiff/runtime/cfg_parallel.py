"""Guidance split: each condition of a guided batch has ranks of its own.

With classifier-free guidance the denoiser's batch holds two conditions, one after the other, that
do not know of each other. Two groups of ranks can take one each, exactly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..graph.batch import BatchSplit
from ..graph.signature import Call, Role, Signature, parse
from ..graph.weights import Weights
from ..graph.writes import Written
from ..partition.partition import Partition
from ..processes.team import Team
from ..schedule.actions import Tick
from ..schedule.plan import Plan
from .devices import Place
from .engine import Engine
from .step import READY_NOW, Caller, Earlier, Ready, Times


class Groups:
    """Engines that serve one part of the batch each, used as one engine is.

    ``call`` is a call with the whole batch, of which the tensors that are ``batched`` hold a part
    for each engine, as ``split`` says; the engines are made for :func:`part` of it.
    """

    def __init__(
        self, engines: Sequence[Engine], call: Call, batched: Sequence[bool], split: BatchSplit
    ) -> None:
        self.engines = list(engines)
        self._split = split
        self.signature: Signature = call.signature
        self.batched = list(batched)
        self._moving = call.indices(Role.LATENTS)
        self._time = next(iter(call.indices(Role.TIMESTEP)), 0)
        #: The parts of conditioning, kept so that an engine sees the same tensors in every step.
        self._parts: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}
        #: Whether results are waited for on the host, as those of other hosts are: then not before
        #: everything is issued, so that nobody waits for what this process has not begun.
        self._late = len(set(self.team.hosts)) > 1
        #: what was taken of the tick that was issued last
        self._taken: list[dict[int, list[Any]]] = []

    @property
    def partition(self) -> Partition:
        """How each part's denoiser is split: all alike."""
        return self.engines[0].partition

    @property
    def places(self) -> list[Place]:
        """One entry a rank, group by group."""
        return [p for engine in self.engines for p in engine.places]

    @property
    def team(self) -> Team:
        """The processes that own the ranks."""
        return self.engines[0].team

    @property
    def workers(self) -> list[Any]:
        """The workers of this process's ranks, group by group."""
        return [w for engine in self.engines for w in engine.workers]

    def bundle_bytes(self, exact: bool) -> dict[tuple[int, int], int]:
        """Bytes that cross from one component to another, in all groups together, in an exact step
        or another one."""
        found = [engine.bundle_bytes(exact) for engine in self.engines]
        return {edge: sum(of_group[edge] for of_group in found) for edge in found[0]}

    @property
    def compile_s(self) -> float:
        """Seconds that compiling took."""
        return sum(engine.compile_s for engine in self.engines)

    def prepare(self, plan: Plan) -> None:
        """See :meth:`asyncdiff.runtime.engine.Engine.prepare`; so do the other methods."""
        for engine in self.engines:
            engine.prepare(plan)

    def begin(self, steps: int, tensors: Sequence[torch.Tensor], ready: Ready = READY_NOW) -> None:
        """Start a generation of so many steps, whose first call has these tensors."""
        self._parts.clear()
        parts = [self._parts_of(i, t) for i, t in enumerate(tensors)]
        for g, engine in enumerate(self.engines):
            engine.begin(steps, [p[g] for p in parts], ready)

    def issue(
        self,
        tick: Tick,
        tensors: Sequence[torch.Tensor],
        times: Times,
        earlier: Earlier,
        *,
        ready: Ready = READY_NOW,
    ) -> None:
        """Issue one tick of the whole batch; :meth:`results` are to be taken then."""
        parts = [self._parts_of(i, t) for i, t in enumerate(tensors)]
        # One for all: each engine has the caller's stream wait for its results, and those of one
        # condition are nothing that the next has to wait for.
        caller = Caller(tensors[self._moving[0]].device) if self.engines[0].cuda else None
        self._taken = []
        with self._abandoned():
            for g, engine in enumerate(self.engines):
                given = [p[g] for p in parts], self._times_of(g, times), self._part_of(g, earlier)
                engine.issue(tick, *given, caller)
                if not self._late:
                    self._take(g)

    def results(self) -> dict[int, list[Any]]:
        """The noise predictions of the tick that was issued last, of the whole batch, by step."""
        if self._late:
            with self._abandoned():
                for g in range(len(self.engines)):
                    self._take(g)
        results, self._taken = self._taken, []
        return {
            step: [self._join(leaves) for leaves in zip(*(r[step] for r in results), strict=True)]
            for step in results[0]
        }

    def _take(self, group: int) -> None:
        """Take an engine's results."""
        self._taken.append(self.engines[group].results())

    @contextlib.contextmanager
    def _abandoned(self) -> Iterator[None]:
        """Where it raises, the generation is abandoned, by all engines."""
        try:
            yield
        except BaseException as e:
            self.abandon(e)
            raise

    @property
    def recovers(self) -> bool:
        """See :meth:`asyncdiff.runtime.engine.Engine.recovers`."""
        return all(engine.recovers for engine in self.engines)

    @property
    def over(self) -> bool:
        """See :meth:`asyncdiff.runtime.engine.Engine.over`."""
        return any(engine.over for engine in self.engines)

    @property
    def closed(self) -> bool:
        """Whether nothing runs any more."""
        return self.engines[0].closed

    def give_up(self) -> None:
        """See :meth:`asyncdiff.runtime.engine.Engine.give_up`."""
        for engine in self.engines:
            engine.give_up()

    def finish(self) -> None:
        """Wait for the generation's last work and raise what went wrong."""
        with self._abandoned():
            for engine in self.engines:
                engine.finish()

    def abandon(self, cause: BaseException | None = None) -> None:
        """Stop a generation in the middle."""
        for engine in self.engines:
            engine.abandon(cause)

    def renew(self, weights: Weights, written: Written) -> bool:
        """See :meth:`asyncdiff.runtime.engine.Engine.renew`."""
        return False not in [engine.renew(weights, written) for engine in self.engines]

    def forget(self) -> None:
        """See :meth:`asyncdiff.runtime.engine.Engine.forget`."""
        for engine in self.engines:
            engine.forget()

    def exposed_ms(self) -> float | None:
        """By how long pushes outlast computation in a tick, worst rank; None if not measured."""
        known = [ms for engine in self.engines if (ms := engine.exposed_ms()) is not None]
        return max(known) if known else None

    def close(self) -> None:
        """Free all."""
        for engine in self.engines:
            engine.close()

    def _times_of(self, group: int, times: Times) -> Times:
        """A group's part of timesteps, where each sample has its own."""
        return {k: self._part(group, self._time, t) for k, t in times.items()}

    def _part_of(self, group: int, earlier: Earlier) -> Earlier:
        """A group's part of the inputs of earlier steps."""
        return {
            step: [self._part(group, i, t) for i, t in zip(self._moving, values, strict=True)]
            for step, values in earlier.items()
        }

    def _part(self, group: int, index: int, value: Any) -> Any:
        """A group's part of an input, which may be a number."""
        if self.batched[index] and isinstance(value, torch.Tensor):
            return self._split.part(value, group)
        return value

    def _join(self, leaves: Sequence[Any]) -> Any:
        if isinstance(leaves[0], torch.Tensor):
            return self._split.join(leaves)
        return leaves[0]

    def _parts_of(self, index: int, tensor: torch.Tensor) -> list[torch.Tensor]:
        if not self.batched[index]:
            return [tensor] * len(self.engines)
        kept = self._parts.get(index)
        if kept is None or kept[0] is not tensor:
            # Parts are views: they show when the caller writes to the tensor.
            kept = tensor, self._split.parts(tensor)
            self._parts[index] = kept
        return kept[1]


def part(
    module: nn.Module,
    call: Call,
    names: Mapping[str, str | None],
    group: int,
    batched: Sequence[bool],
    split: BatchSplit,
) -> Call:
    """A group's share of a call, whose tensors are ``batched`` or shared."""
    each = zip(call.tensors, batched, strict=True)
    tensors = [split.part(t, group) if yes else t for t, yes in each]
    return parse(module, (), call.kwargs(tensors), **names)
