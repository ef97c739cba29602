"""What is kept for calls of one kind: engines, and whether they still are what they were."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..graph.writes import WeightWatch
from .cfg_parallel import Groups
from .engine import Engine


@dataclass
class Ranks:
    """What a branch has: the engine of the components, and maybe one that has the whole denoiser on
    a device, or a condition on each of two."""

    engine: Engine | Groups
    whole: Engine | Groups | None = None
    #: which state the denoiser had when it was asked for last, and how often its weights had been
    #: taken anew
    state: int = 0
    renewals: int = 0


@dataclass
class Prepared:
    """What is kept for calls of one kind: what tells of writes to its weights, how often these were
    taken anew, and the engines, by index of the branch."""

    watch: WeightWatch
    renewals: int = 0
    #: whether the weights lie elsewhere now than those of these ranks, which have to be made anew
    over: bool = False
    branches: dict[int, Ranks] = field(default_factory=dict)

    @property
    def recovers(self) -> bool:
        """Whether the exchange goes on after a failure."""
        return all(engine.recovers for engine in self.engines)

    @property
    def engines(self) -> list[Engine | Groups]:
        """All of them."""
        both = ((ranks.engine, ranks.whole) for ranks in self.branches.values())
        return [engine for pair in both for engine in pair if engine is not None]

    def take(self, index: int, engine: Engine | Groups) -> None:
        """Keep an engine for a branch, in place of the one before, if there is one."""
        old = self.branches.pop(index, None)
        self.branches[index] = Ranks(engine)
        for over in () if old is None else (old.engine, old.whole):
            if over is not None:
                over.close()

    def asked(self, index: int, state: int) -> Engine | Groups:
        """The engine of a branch, which is asked for in this state of the denoiser."""
        ranks = self.branches[index]
        ranks.state, ranks.renewals = state, self.renewals
        return ranks.engine

    def serves(self, engine: Engine | Groups, state: int) -> bool:
        """Whether an engine is one of these, and nothing has changed since it was asked for, also
        not because another branch has asked; ``state``: that of the denoiser now."""
        for ranks in self.branches.values():
            if engine is ranks.engine or engine is ranks.whole:
                same = (ranks.state, ranks.renewals) == (state, self.renewals)
                return same and not self.watch.changed()
        return False

    def renewed(self, watch: WeightWatch) -> None:
        """The ranks' weights are what the denoiser's are now."""
        for engine in self.engines:
            engine.forget()
        self.watch = watch
        self.renewals += 1
