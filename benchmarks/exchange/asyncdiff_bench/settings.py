"""What is sent, how often and for how long: chosen once, and handed to every process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from . import payload
from .errors import BenchError
from .machine import Machine

SIZES = "1K,4K,16K,64K,256K,1M,4M,16M,64M,256M"
QUICK_SIZES = "16K,64K,1M,16M,256M"
HOST_SIZES = "1K,64K,1M"
BUNDLES = ("18x256K", "sd21-N2", "sdxl-N2")
HOST_BUNDLES = ("18x256K",)


@dataclass(frozen=True)
class Settings:
    """``seconds`` is the time that the ways in one process, and those in several, have each, after
    their processes have started."""

    devices: tuple[str, ...]
    sizes: tuple[int, ...]
    bundles: tuple[str, ...]
    rounds: int
    seconds: float

    @classmethod
    def choose(
        cls,
        machine: Machine,
        *,
        sizes: str | None = None,
        bundles: str | None = None,
        rounds: int | None = None,
        seconds: float | None = None,
        quick: bool = False,
    ) -> Settings:
        """Fill in what is None. Raises BenchError for what cannot be."""
        if sizes is None:
            sizes = QUICK_SIZES if quick else SIZES
            sizes = sizes if machine.cuda else HOST_SIZES
        if bundles is None:
            names: Sequence[str] = BUNDLES[:2] if quick else BUNDLES
            names = names if machine.cuda else HOST_BUNDLES
        else:
            names = [b.strip() for b in bundles.split(",")]
        for name in names:
            payload.of_model(name)
        rounds = (5 if quick else 11) if rounds is None else rounds
        if rounds < 1:
            raise BenchError(f"rounds is at least 1, not {rounds}")
        seconds = (10.0 if quick else 55.0) if seconds is None else seconds
        if not seconds > 0:
            raise BenchError(f"seconds has to be positive, not {seconds}")
        return cls(machine.devices, payload.read_sizes(sizes), tuple(names), rounds, seconds)

    @property
    def machine(self) -> Machine:
        """The machine that the settings are for."""
        return Machine(self.devices)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Settings:
        """The inverse of :meth:`to_dict`."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**plain)
