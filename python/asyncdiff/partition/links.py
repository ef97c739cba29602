"""How fast bundles travel between ranks, by pair and direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

#: From one rank to another.
Pair = tuple[int, int]


@dataclass(frozen=True)
class Link:
    """The way from one rank to another: ``bytes_per_ms``, and milliseconds that a bundle without
    bytes takes."""

    bytes_per_ms: float
    latency_ms: float = 0.0


@dataclass(frozen=True)
class Links:
    """The links between ranks, while all that a tick sends is under way; ``otherwise`` is that of
    pairs that are not named, such as ranks of one device."""

    otherwise: Link
    pairs: Mapping[Pair, Link] = field(default_factory=dict)

    @classmethod
    def alike(cls, bytes_per_ms: float) -> Links:
        """The same link between any two ranks, without latency."""
        return cls(Link(bytes_per_ms))

    def of(self, kept: Sequence[Sequence[float]]) -> Links:
        """These, with the pairs that :meth:`to_list` told of. Raises ValueError for other data."""
        return Links(self.otherwise, {(int(a), int(b)): Link(x, y) for a, b, x, y in kept})

    def between(self, source: int, target: int) -> Link:
        """From one rank to another."""
        return self.pairs.get((source, target), self.otherwise)

    def from_component(self, index: int, components: int, copies: int) -> Link:
        """What component ``index`` sends its boundary by, rank i running component i and the last
        ``copies`` ranks the last one, to each of which the one before it sends all. The last one
        sends its result, by any of them."""
        if index == components - 1:
            return Link(self.bytes_per_ms, self.latency_ms)
        if index < components - 2 or copies == 1:
            return self.between(index, index + 1)
        targets = range(components - 1, components - 1 + copies)
        slowest = min((self.between(index, t) for t in targets), key=lambda x: x.bytes_per_ms)
        return Link(slowest.bytes_per_ms / copies, slowest.latency_ms)

    @property
    def bytes_per_ms(self) -> float:
        """Of the slowest of them."""
        return min(x.bytes_per_ms for x in (self.pairs.values() or [self.otherwise]))

    @property
    def latency_ms(self) -> float:
        """The longest of them."""
        return max(x.latency_ms for x in (self.pairs.values() or [self.otherwise]))

    def to_list(self) -> list[list[float]]:
        """Plain data for JSON: from, to, bytes a millisecond, milliseconds."""
        return [[a, b, x.bytes_per_ms, x.latency_ms] for (a, b), x in sorted(self.pairs.items())]

    def like(self, kept: Sequence[Sequence[float]]) -> bool:
        """Whether they are what :meth:`to_list` told of others, as well as one can measure."""
        mine = self.to_list()
        return len(mine) == len(kept) and all(
            (a, b) == (c, d) and max(x, y) <= _ALIKE * min(x, y)
            for (a, b, x, _), (c, d, y, _) in zip(mine, kept, strict=True)
        )


#: Bandwidths that differ by less count as the same.
_ALIKE = 1.5
