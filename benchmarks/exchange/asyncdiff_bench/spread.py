"""Several measurements of one thing: the median, and how far they lie apart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Spread:
    """Median, quartiles, extremes and number of the rounds."""

    median: float
    q1: float
    q3: float
    min: float
    max: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float], digits: int = 4) -> Spread:
        """Of at least one value. Quartiles are those of the sample itself ("inclusive")."""
        if not values:
            raise ValueError("no rounds were measured")
        if len(values) == 1:
            q1 = middle = q3 = values[0]
        else:
            q1, middle, q3 = statistics.quantiles(values, n=4, method="inclusive")
        low, high = min(values), max(values)
        q1, middle, q3, low, high = (round(x, digits) for x in (q1, middle, q3, low, high))
        return cls(middle, q1, q3, low, high, len(values))

    def to_dict(self) -> dict[str, float]:
        """Plain data."""
        return asdict(self)
