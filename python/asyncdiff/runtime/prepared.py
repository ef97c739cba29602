"""What is kept for calls of one kind: engines, and whether they still are what they were."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..graph.signature import Role, Signature, difference
from ..graph.state.structure import Structure
from ..graph.weights import Weights
from ..graph.writes import WeightWatch
from ..partition.partition import Partition
from .cfg_parallel import Groups
from .engine import Engine

log = logging.getLogger("asyncdiff")

#: So many exported denoisers are kept.
_CUTS = 16
#: So many kinds of calls are remembered that had to make room.
_REMEMBERED = 32


@dataclass
class Ranks:
    """What a branch has: the engine of the components, and those of exact steps on devices that
    have the whole denoiser, by exact_mode."""

    engine: Engine | Groups
    whole: dict[str, Engine | Groups] = field(default_factory=dict)
    #: of the denoiser, and how often its weights had been taken anew, when it was asked for last
    version: int = 0
    renewals: int = 0

    @property
    def engines(self) -> list[Engine | Groups]:
        """All of them."""
        return [self.engine, *self.whole.values()]


@dataclass
class Prepared:
    """What is kept for calls of one kind: what brings weights and tells of writes to them, the
    version of the denoiser that ranks have the weights of, how often these were taken anew, and the
    engines, by index of the branch."""

    weights: Weights
    watch: WeightWatch
    version: int
    renewals: int = 0
    branches: dict[int, Ranks] = field(default_factory=dict)
    #: how often copies had become those of other weights when these ranks' were looked at
    exchanges: int = -1

    def __post_init__(self) -> None:
        self.exchanges = self.weights.exchanges

    @property
    def recovers(self) -> bool:
        """Whether the exchange goes on after a failure."""
        return all(engine.recovers for engine in self.engines)

    @property
    def engines(self) -> list[Engine | Groups]:
        """All of them."""
        return [engine for ranks in self.branches.values() for engine in ranks.engines]

    def take(self, index: int, engine: Engine | Groups) -> None:
        """Keep an engine for a branch, in place of the one before, if there is one."""
        old = self.branches.pop(index, None)
        self.branches[index] = Ranks(engine)
        for over in () if old is None else old.engines:
            over.close()

    def asked(self, index: int, version: int) -> Engine | Groups:
        """The engine of a branch, which is asked for at this version of the denoiser."""
        ranks = self.branches[index]
        ranks.version, ranks.renewals = version, self.renewals
        return ranks.engine

    def serves(self, engine: Engine | Groups, version: int) -> bool:
        """Whether an engine is one of these, and the denoiser is what it was when it was asked for,
        its weights also not taken anew because another branch has asked; ``version``: that of the
        denoiser now."""
        for ranks in self.branches.values():
            if any(engine is e for e in ranks.engines):
                same = (ranks.version, ranks.renewals) == (version, self.renewals)
                return same and not self.stale(version)
        return False

    def stale(self, version: int) -> bool:
        """Whether the denoiser has, or may have, other weights now than the ranks."""
        then = self.version, self.exchanges
        return self.watch.changed() or then != (version, self.weights.exchanges)

    def renew(self, structure: Structure, version: int) -> bool:
        """Give the ranks the weights and numbers that the denoiser has now; whether that was
        possible. Otherwise they have to be made anew."""
        captured = {id(e.partition.captured): e.partition.captured for e in self.engines}
        for each in captured.values():
            each.follow(structure)
            self.weights.look(each)
        weights = [w for each in captured.values() for w in each.weights.values()]
        written = self.watch.written(weights)
        if False in [engine.renew(self.weights, written) for engine in self.engines]:
            return False
        self.watch = WeightWatch(weights)
        self.version, self.exchanges = version, self.weights.exchanges
        self.renewals += 1
        return True


class Cuts:
    """Denoisers that were exported and cut, by kind of calls, for when these come again whose
    engines had to make room: a graph takes little memory, and its weights are the module's own."""

    def __init__(self) -> None:
        self._kept: dict[Any, Partition] = {}
        #: what is to be made again
        self._asked: Partition | None = None

    def keep(self, kind: Any, parts: Partition) -> None:
        """Keep what was made for a kind."""
        self._kept.pop(kind, None)
        self._kept[kind], self._asked = parts, None
        if len(self._kept) > _CUTS:
            del self._kept[next(iter(self._kept))]

    def again(self, kind: Any, structure: Structure, components: int) -> Partition | None:
        """What was made for a kind, in so many components, with the weights that there are now."""
        parts = self._kept.get(kind)
        if parts is None or len(parts.components) != components:
            return None
        parts.captured.follow(structure)
        self._asked = parts
        return parts

    def let_go(self, engines: Iterable[Engine | Groups]) -> None:
        """Hold no weights that may be replaced meanwhile, but of what these engines run."""
        used = {id(engine.partition.captured) for engine in engines}
        for parts in self._kept.values():
            if parts is not self._asked and id(parts.captured) not in used:
                parts.captured.let_go()


class Turns:
    """Tells, once, when kinds of calls come in turns, and each is prepared again and again."""

    def __init__(self) -> None:
        #: those that had to make room, the last one at the end
        self._gone: dict[Signature, None] = {}
        self._last: Signature | None = None
        self._told = False

    def dropped(self, signatures: Iterable[Signature]) -> None:
        """Calls of these signatures had to make room for others."""
        for signature in signatures:
            self._gone.pop(signature, None)
            self._gone[signature] = None
            if len(self._gone) > _REMEMBERED:
                del self._gone[next(iter(self._gone))]

    def prepared(self, signature: Signature, kept: int) -> None:
        """Calls of this one are prepared, of which ``kept`` are kept."""
        if signature in self._gone and not self._told and self._last is not None:
            self._told = True
            log.warning(
                "the denoiser is prepared once more for calls that it had been prepared for: of "
                "more than %d kinds, which come in turns, those used last are kept (%s). Draw what "
                "is alike one after another, or make it alike: one size, prompts of one length",
                kept,
                difference(self._last, signature),
            )
        self._last = signature


def same_latents(a: Signature, b: Signature) -> bool:
    """Whether two calls have latents and times of the same shapes: only their conditioning
    differs."""
    moving = (Role.LATENTS, Role.TIMESTEP)
    first, second = ([x for x in s.inputs if x.role in moving] for s in (a, b))
    return first == second
