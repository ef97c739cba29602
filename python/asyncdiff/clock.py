"""What one rank knows of time: counters and the denoiser's timestep, advanced on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .update import kernels


class Clock:
    """Writes the timestep of the next tick to a rank's timestep arguments, and counts.

    ``targets`` are the arguments' tensors (any shape; all elements get the same value), ``ticks``
    how many ticks a generation has, ``step`` an :class:`asyncdiff.update.Update`'s counter.
    """

    def __init__(
        self,
        targets: Sequence[torch.Tensor],
        ticks: int,
        device: torch.device,
        step: torch.Tensor | None = None,
        triton: bool | None = None,
    ) -> None:
        self._targets = list(targets)
        self._step = step
        self._tick = torch.zeros(1, dtype=torch.int64, device=device)
        # The last row is written after the last tick, and never used.
        self._times = [
            torch.zeros(ticks + 1, dtype=target.dtype, device=device) for target in targets
        ]
        self._kernels = kernels(device, triton)

    def rewind(self) -> None:
        """Count from the first tick and the first step again."""
        self._tick.zero_()
        if self._step is not None:
            self._step.zero_()

    def load(self, times: torch.Tensor | None) -> None:
        """Begin a generation; ``times`` has the timestep of every tick (None without targets)."""
        self.rewind()
        for target, table in zip(self._targets, self._times, strict=True):
            assert times is not None
            table[:-1].copy_(times)
            target.copy_(table[0])

    def advance(self, served: int) -> None:
        """Go on to the next tick, after one that served so many steps."""
        pairs = list(zip(self._times, self._targets, strict=True))
        if not pairs and self._step is None:
            return
        if self._kernels is not None and len(pairs) <= 1:
            times, target = pairs[0] if pairs else (None, None)
            self._kernels.tick(self._tick, times, target, self._step, served)
            return
        self._tick.add_(1)
        for times, target in pairs:
            target.copy_(times.index_select(0, self._tick)[0])
        if self._step is not None:
            self._step.add_(served)
