"""What is kept for calls of one kind: engines, and whether they still are what they were."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..graph.state.structure import Structure
from ..graph.weights import Weights
from ..graph.writes import WeightWatch
from .cfg_parallel import Groups
from .engine import Engine


@dataclass
class Ranks:
    """What a branch has: the engine of the components, and maybe one that has the whole denoiser on
    a device, or a condition on each of two."""

    engine: Engine | Groups
    whole: Engine | Groups | None = None
    #: of the denoiser, and how often its weights had been taken anew, when it was asked for last
    revision: int = 0
    renewals: int = 0


@dataclass
class Prepared:
    """What is kept for calls of one kind: what tells of writes to its weights, the revision of the
    denoiser that ranks have the weights of, how often these were taken anew, and the engines, by
    index of the branch."""

    watch: WeightWatch
    revision: int
    renewals: int = 0
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

    def asked(self, index: int, revision: int) -> Engine | Groups:
        """The engine of a branch, which is asked for at this revision of the denoiser."""
        ranks = self.branches[index]
        ranks.revision, ranks.renewals = revision, self.renewals
        return ranks.engine

    def serves(self, engine: Engine | Groups, revision: int) -> bool:
        """Whether an engine is one of these, and nothing has changed since it was asked for, also
        not because another branch has asked; ``revision``: that of the denoiser now."""
        for ranks in self.branches.values():
            if engine is ranks.engine or engine is ranks.whole:
                same = (ranks.revision, ranks.renewals) == (revision, self.renewals)
                return same and not self.watch.changed()
        return False

    def stale(self, revision: int) -> bool:
        """Whether the denoiser has other weights now than the ranks."""
        return self.revision != revision or self.watch.changed()

    def renew(self, weights: Weights, structure: Structure, revision: int) -> bool:
        """Give the ranks the weights and numbers that the denoiser has now; whether that was
        possible. Otherwise they have to be made anew."""
        captured = {id(e.partition.captured): e.partition.captured for e in self.engines}
        for each in captured.values():
            each.follow(structure)
        written = self.watch.written()
        if False in [engine.renew(weights, written) for engine in self.engines]:
            return False
        self.watch = WeightWatch(w for each in captured.values() for w in each.weights.values())
        self.revision = revision
        self.renewals += 1
        return True
