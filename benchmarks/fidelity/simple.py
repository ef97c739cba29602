"""What needs no method: fewer steps of the sampler, and guidance split over two devices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from fidelity.macs import total
from fidelity.method import Method, Work


class FewerSteps(Method):
    """The plain pipeline with fewer sampler steps, on one device."""

    devices = 1

    def __init__(self, steps: int) -> None:
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
        """Half of a guided batch."""
        macs = float(total(pipe)) * steps / 2
        return Work(macs, macs)
