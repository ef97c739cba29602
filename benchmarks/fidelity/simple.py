"""What needs no method: fewer steps of the sampler, and guidance split over two devices."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from asyncdiff_bench.errors import BenchError
from fidelity.macs import total
from fidelity.method import Method, Work


class FewerSteps(Method):
    """The plain pipeline with fewer sampler steps, on one device. BenchError for less than one."""

    devices = 1

    def __init__(self, steps: int) -> None:
        if steps < 1:
            raise BenchError(f"there are no {steps} sampler steps")
        self.name = f"fewer steps, {steps}"
        self.steps = steps

    @contextlib.contextmanager
    def applied(self, pipe: Any, steps: int) -> Iterator[int]:
        """See :class:`Method`."""
        yield self.steps

    def work(self, pipe: Any, call: Mapping[str, Any], steps: int) -> Work:
        """All of fewer steps."""
        macs = float(total(pipe)) * self.steps
        return Work(macs, macs)


class GuidanceSplit(Method):
    """The plain pipeline, each condition of the guidance on a device of its own: exact."""

    name = "guidance split"
    devices = 2

    def work(self, pipe: Any, call: Mapping[str, Any], steps: int) -> Work:
        """Half of a guided batch; without guidance there is nothing to split."""
        guided = call.get("guidance_scale", math.inf) > 1
        macs = float(total(pipe)) * steps / (2 if guided else 1)
        return Work(macs, macs)
