"""What a run of the benchmark yields: figures, and what was left out and why. Plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .spread import Spread


@dataclass(frozen=True)
class Figure:
    """One measured quantity; docs/metrics.md defines each ``metric``.

    ``nbytes`` are those of one bundle of ``tensors`` tensors; ``moved`` all bytes that cross in the
    time of a figure in µs (twice the bundle where both directions run, the bundle for each
    receiver where one sends to many).
    """

    case: str
    way: str
    launch: str
    payload: str
    nbytes: int
    tensors: int
    metric: str
    unit: str
    value: Spread
    moved: int = 0
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def gb_per_s(self) -> float | None:
        """10^9 bytes a second, from the median; None where the figure is no such time."""
        if not self.moved or self.unit != "µs" or self.value.median <= 0:
            return None
        return self.moved / self.value.median / 1e3

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with ``gb_per_s`` for readers."""
        rate = self.gb_per_s
        return asdict(self) | {"gb_per_s": None if rate is None else round(rate, 3)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Figure:
        """The inverse of :meth:`to_dict`."""
        rest = {k: v for k, v in data.items() if k not in ("gb_per_s", "value")}
        return cls(value=Spread(**data["value"]), **rest)


@dataclass(frozen=True)
class LeftOut:
    """Something that was asked for and not measured. ``failed``: it should have worked."""

    case: str
    way: str
    reason: str
    payload: str = ""
    failed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass
class Results:
    """All figures of a run, and all that was left out."""

    devices: tuple[str, ...]
    figures: list[Figure] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failed(self) -> list[LeftOut]:
        """What should have worked and did not."""
        return [x for x in self.left_out if x.failed]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "devices": list(self.devices),
            "seconds": round(self.seconds, 1),
            "figures": [f.to_dict() for f in self.figures],
            "left_out": [x.to_dict() for x in self.left_out],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Results:
        """The inverse of :meth:`to_dict`."""
        return cls(
            tuple(data["devices"]),
            [Figure.from_dict(f) for f in data["figures"]],
            [LeftOut(**x) for x in data["left_out"]],
            data["seconds"],
        )
