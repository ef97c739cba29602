"""A case: what is measured, where it cannot be, and how it runs for one way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import asyncdiff_core as core

from ..bench import Bench
from ..errors import BenchError
from ..figures import Figure, LeftOut
from ..machine import Machine
from ..payload import Payload, of_model, of_size
from ..settings import Settings
from ..ways import Way


def _always(machine: Machine, way: Way) -> str | None:
    return None


@dataclass(frozen=True)
class Case:
    """``payloads`` chooses what is sent; ``measure`` yields the figures of one payload; ``missing``
    says why the case cannot run for a way on a machine, beside what the way itself lacks."""

    key: str
    description: str
    payloads: Callable[[Settings], Sequence[Payload]]
    measure: Callable[[Bench, Way, Payload], Iterator[Figure]]
    missing: Callable[[Machine, Way], str | None] = _always

    def left_out(self, machine: Machine, way: Way) -> str | None:
        """Why this case cannot run for this way here; None where it can."""
        return way.missing(machine) or self.missing(machine, way)

    def run(self, bench: Bench, way: Way) -> Iterator[Figure | LeftOut]:
        """All payloads; what cannot be measured is left out with its reason, and costs the others
        nothing."""
        for payload in self.payloads(bench.settings):
            if not bench.in_time():
                yield LeftOut(self.key, way.key, "no time left", payload.name)
                continue
            try:
                yield from self.measure(bench, way, payload)
            except core.InvalidArgument as error:  # not every mode takes every bundle
                yield LeftOut(self.key, way.key, _line(error), payload.name)
            except (BenchError, core.CoreError, RuntimeError) as error:
                # Of several processes the others do not know of it: then all start anew.
                if way.distributed and not isinstance(error, BenchError):
                    raise
                yield LeftOut(self.key, way.key, _line(error), payload.name, failed=True)
                bench.world.recover()


def sizes(settings: Settings) -> list[Payload]:
    """One tensor of each size."""
    return [of_size(n) for n in settings.sizes]


def large(settings: Settings) -> list[Payload]:
    """The sizes from 64 KB on; all of them where they are smaller."""
    chosen = [n for n in settings.sizes if n >= 64 << 10] or settings.sizes
    return [of_size(n) for n in chosen]


def bundles(settings: Settings) -> list[Payload]:
    """The bundles of many tensors."""
    return [of_model(name) for name in settings.bundles]


def needs_gpu(machine: Machine, way: Way) -> str | None:
    """For times that threads which share the cores cannot show."""
    return None if machine.cuda else "needs a GPU"


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
