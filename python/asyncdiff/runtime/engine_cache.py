"""Engines made ready for calls of one signature, and kept for later calls like them, as long as the
denoiser stays what it was."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from ..config import GROUPS
from ..errors import reason
from ..graph.batch import BatchSplit
from ..graph.hooks import check_hooks, check_layers
from ..graph.signature import Call, Role, Signature
from ..graph.state.module_state import ModuleState
from ..graph.state.structure import Structure
from ..graph.weights import Held
from ..graph.writes import WeightWatch
from ..memory import out_of_memory
from ..processes.agreement import digest
from ..progress import bar
from ..schedule.branch import ONLY, Branch
from ..schedule.plan import Plan
from .cfg_parallel import Groups
from .devices import Deployment, Place, collect
from .engine import Engine
from .making import EngineMaker
from .pipelined import split_of
from .prepared import Cuts, Prepared, Turns, same_latents

log = logging.getLogger("asyncdiff")

#: Kinds of calls whose engines are kept. Each engine holds mailboxes and graphs.
_KEPT = 4
#: A guided batch that is cut into its conditions.
_CONDITIONS = BatchSplit(1, GROUPS)

#: The signature of a call, what the denoiser was then
#: (:class:`~..graph.state.module_state.ModuleState`), and how the batch is cut, if it is cut.
_Kind = tuple[Signature, int, BatchSplit | None]
_T = TypeVar("_T")


class EngineCache:
    """The engines of one denoiser, by kind of the call. All processes call the same methods in the
    same order."""

    def __init__(self, deployment: Deployment) -> None:
        self._module, self._weights = deployment.module, deployment.weights
        self._config, self._team = deployment.config, deployment.team
        self._places = list(deployment.places)
        #: the layers of which it is known that no hooks are on them
        self._free_of_hooks: Structure | None = None
        self._state = ModuleState(self._module)
        self._weights.current = self._copies
        #: those that were asked for last are at the end
        self._kept: OrderedDict[_Kind, Prepared] = OrderedDict()
        self._turns, self._cuts = Turns(), Cuts()
        self._maker = EngineMaker(deployment, self._state.number)

    def __len__(self) -> int:
        return len(self._kept)

    def link_speed(self) -> float:
        """Bytes a millisecond of a link between ranks, measured once. Collective."""
        return self._maker.link_speed()

    def changed(self, engine: Engine | Groups) -> bool:
        """Whether the denoiser, or a weight of it, is not what it was when ``engine`` was asked for
        last. So it is for those that were dropped."""
        version = self._state.version
        return not any(kept.serves(engine, version) for kept in self._kept.values())

    def get(
        self,
        call: Call,
        what: str = "prepare",
        given: Callable[[], Mapping[str, str]] = dict,
        branch: Branch = ONLY,
        beside: Sequence[Engine | Groups] = (),
    ) -> Engine | Groups:
        """The engine of the components, for calls like this one. ``what`` for, and what else is
        ``given`` for it: all processes have to be given the same. ``beside``: the engines that
        other branches use, which stay, and on whose ranks' streams this one takes its turns. Raises
        InputError for a denoiser with hooks, MismatchError where processes differ."""
        with self._state.settled():
            return self._looked(call, what, given, branch, beside)

    def _looked(
        self,
        call: Call,
        what: str,
        given: Callable[[], Mapping[str, str]],
        branch: Branch,
        beside: Sequence[Engine | Groups],
    ) -> Engine | Groups:
        """:meth:`get`, of a denoiser that was looked at."""
        kind: _Kind
        written = False

        def look() -> None:
            nonlocal kind, written
            self._check_hooks()
            kind = self._kind(call, branch)
            kept = self._kept.get(kind)
            written = kept is not None and kept.stale(self._state.version)

        def said() -> Mapping[str, str]:
            look()
            prepared = f"prepared: {kind in self._kept}, weights written to: {written}"
            slots = self._state.structure.slots.items()
            return {
                **given(),
                "what the denoiser is since the last generation": prepared,
                "the scales of the denoiser's adapters": digest(f"{n} {s.value}" for n, s in slots),
            }

        if self._team.several:
            self._team.agree(what, said)
        else:
            look()
        kept = {id(e) for p in self._kept.values() for e in p.engines}
        self._maker.beside = [e for e in beside if id(e) in kept]
        with self._team.busy():
            return self._get(call, kind, branch, written)

    def _get(self, call: Call, kind: _Kind, branch: Branch, written: bool) -> Engine | Groups:
        """:meth:`get`; ``written``: the ranks of this kind may have other weights than there are
        now."""
        self._drop_what_is_over(kind)
        if written and kind in self._kept:
            self._renew(kind)
        if kind not in self._kept or branch.index not in self._kept[kind].branches:
            config = self._config
            if kind not in self._kept:
                self._turns.prepared(kind[0], _KEPT)
                idle = self._idle(kind)
                over = idle[: max(0, len(self._kept) + 1 - _KEPT)]  # for its memory
                self._turns.dropped([k[0] for k in over])
                self._drop(over)
            like = next((e.partition for e in self._like(kind)), None)
            like = self._cuts.again(kind, self._state.structure, config.components) or like
            with bar(config.progress):
                made = self._with_room(
                    lambda: self._maker.ranks(
                        call,
                        config.components,
                        self._places_of(branch),
                        kind[2],
                        like=like,
                        tokens=config.schedule == "sequence",
                    ),
                    kind,
                )
            # Capturing runs the denoiser, which may keep something, and be what it was once before.
            captured = made.partition.captured
            self._state.learn(captured.guards)
            kind = self._kind(call, branch)
            if kind not in self._kept:
                watch = WeightWatch(captured.weights.values())
                self._kept[kind] = Prepared(self._weights, watch, self._state.version)
            self._kept[kind].take(branch.index, made)
            self._cuts.keep(kind, made.partition)
        self._kept.move_to_end(kind)
        return self._kept[kind].asked(branch.index, self._state.version)

    def _copies(self) -> list[Held]:
        """The copies that ranks hold of weights which were not written to since: those that are
        made for other sizes need not copy them again."""
        version = self._state.version
        return [
            held
            for kept in self._kept.values()
            if not kept.stale(version)
            for engine in kept.engines
            for worker in engine.workers
            for held in worker.program.held.values()
        ]

    def _idle(self, mine: _Kind | None) -> list[_Kind]:
        """The other kinds that no branch is using, those that were asked for longest ago first."""
        using = {id(e) for e in self._maker.beside}
        return [
            kind
            for kind, kept in self._kept.items()
            if kind != mine and using.isdisjoint(map(id, kept.engines))
        ]

    def _like(self, kind: _Kind) -> list[Engine | Groups]:
        """Engines whose cuts those of this kind had better share: ranks then hold their weights
        once, and nothing is measured again. For other sizes of the latents other cuts may be
        better."""
        same = self._kept[kind].engines if kind in self._kept else []
        # Not those of a denoiser that was another one: what they captured is shared, too.
        beside = [
            e
            for kept in self._kept.values()
            for e in kept.engines
            if any(e is b for b in self._maker.beside) and kept.serves(e, self._state.version)
        ]
        others = [
            engine
            for other, kept in reversed(self._kept.items())
            for engine in kept.engines
            if other[1:] == kind[1:] and other[0] != kind[0] and same_latents(other[0], kind[0])
        ]
        count = self._config.components
        return [e for e in (*same, *beside, *others) if len(e.partition.components) == count]

    def _places_of(self, branch: Branch) -> list[Place]:
        """The places of the ranks that run a branch: with guidance="split" those of a group."""
        config = self._config
        if config.guidance != "split" or branch.count == 1:
            return self._places
        first = branch.index % GROUPS * config.ranks
        return self._places[first : first + config.ranks]

    def _drop_what_is_over(self, kind: _Kind) -> None:
        """Drop the engines of a kind whose exchange a failure has ended for good, as between GPUs
        of several hosts: they are made anew."""
        kept = self._kept.get(kind)
        if kept is None or kept.recovers:
            return
        if self._team.every("look at the exchange", lambda: not any(e.over for e in kept.engines)):
            return
        for engine in kept.engines:
            engine.give_up()
        self._drop([kind])

    def _renew(self, kind: _Kind) -> None:
        """Give the engines of a kind what its weights are now; drop the engines where they have to
        be made anew for that."""
        kept, version = self._kept[kind], self._state.version
        structure = self._state.structure
        if not self._team.every(
            "take the denoiser's weights", lambda: kept.renew(structure, version)
        ):
            self._drop([kind])
            return
        log.info("weights were written to: ranks have their new values")

    def _check_hooks(self) -> None:
        """Raise InputError for hooks: on layers, where something has changed since they were
        looked at last."""
        check_hooks()
        if self._free_of_hooks is None or self._state.structure is not self._free_of_hooks:
            self._free_of_hooks = None
            check_layers(self._module)
            self._free_of_hooks = self._state.structure

    def _kind(self, call: Call, branch: Branch) -> _Kind:
        return call.signature, self._state.number(), self._split(call, branch)

    def _split(self, call: Call, branch: Branch) -> BatchSplit | None:
        """How the components' engines cut the batch."""
        config = self._config
        if config.schedule == "pipeline":
            return split_of(call, call.indices(Role.LATENTS)[0], config.components)
        return _CONDITIONS if config.guidance == "split" and branch.count == 1 else None

    def whole(self, call: Call, branch: Branch, mode: str) -> Engine | Groups:
        """The engine of exact steps on devices that have the whole denoiser. ``mode``, the
        exact_mode: "split", two with a condition each, or one of them for a branch of several;
        "sequence", all of them, with a share of the tokens each. Only after :meth:`get` for the
        same call."""
        kind = next(reversed(self._kept))
        ranks = self._kept[kind].branches[branch.index]
        if mode not in ranks.whole:
            mine = ranks.engine
            first = self._places[0]
            places = [first, next((p for p in self._places if p != first), first)]
            split: BatchSplit | None = _CONDITIONS
            known = mine.batched if isinstance(mine, Groups) else None
            like, count = None, 1
            if mode == "sequence":
                places, split, count = self._places_of(branch), kind[2], self._config.ranks
                like = mine.partition
            elif branch.count > 1:
                places, split = [places[branch.index % GROUPS]], None
                like = mine.partition
            with self._team.busy():
                ranks.whole[mode] = self._with_room(
                    lambda: self._maker.ranks(
                        call, count, places, split, known, like, mode == "sequence"
                    ),
                    kind,
                )
        return ranks.whole[mode]

    def prepare(self, engine: Engine | Groups, plan: Plan) -> None:
        """Make an engine of the calls that were asked for last ready for ``plan``."""
        with self._team.busy():
            self._with_room(lambda: engine.prepare(plan), next(reversed(self._kept)))

    def close(self) -> None:
        """Free all engines."""
        self._drop(list(self._kept))

    def _drop(self, kinds: Sequence[_Kind]) -> None:
        for kind in kinds:
            dropped = self._kept.pop(kind).engines
            self._maker.beside = [e for e in self._maker.beside if not any(e is d for d in dropped)]
            for engine in dropped:
                engine.close()
        self._cuts.let_go(e for kept in self._kept.values() for e in kept.engines)
        if kinds and self._places[0].device.type == "cuda":
            collect()

    def _with_room(self, work: Callable[[], _T], mine: _Kind | None = None) -> _T:
        """What ``work`` for calls of ``mine`` returns; should there be no memory for it, it is done
        again without the engines of all other calls, and without the denoiser, where that was
        there meanwhile. Raises what it raises the second time."""
        stayed = self._weights.leaves and not self._team.several  # where all have to do the same
        try:
            return work()
        except Exception as e:
            others = self._idle(mine)
            if not (others or stayed) or not out_of_memory(e):
                raise
            if others:
                log.warning(
                    "there is no memory for one more kind of calls (%s): what was prepared for the "
                    "%d others is dropped",
                    reason(e),
                    len(others),
                )
        # Only now: the exception holds what was half made.
        self._drop(others)
        if stayed and self._places[0].device.type == "cuda":
            collect()
        return work()
