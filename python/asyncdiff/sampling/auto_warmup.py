"""How many exact steps are enough, by what happens: ``warmup="auto"``.

Asynchronous steps go wrong by as much as the denoiser's values change from one step to the next.
At the beginning that change mostly grows, then falls. Exact steps end once its largest is over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import PlanError

#: A decision for step k knows the changes up to step k − LATE: a step is always under way while the
#: host waits for one, so that launches do not stall, and the same seed decides the same.
LATE = 2


@dataclass(frozen=True)
class AutoWarmup:
    """Exact steps until the relative change of the denoiser's output has fallen to ``decline``
    (0 … 1) of its largest so far, at most ``most`` (None: a fifth of the steps).

    At least four steps are exact, unless ``most`` is less: two changes have to be known, two steps
    late. Raises PlanError for numbers out of range.
    """

    most: int | None = None
    decline: float = 0.7

    def __post_init__(self) -> None:
        if self.most is not None and (not isinstance(self.most, int) or self.most < 1):
            raise PlanError(f"most={self.most!r}: a whole number of exact steps, at least 1")
        if not 0 < self.decline <= 1:
            raise PlanError(f"decline={self.decline!r}: a share between 0 and 1")

    def bound(self, steps: int, exact_tail: int) -> int:
        """The most exact steps that a generation of ``steps`` begins with."""
        most = max(1, steps // 5) if self.most is None else self.most
        return max(1, min(most, steps - exact_tail))


class Drift:
    """The relative changes of one generation's outputs, measured where they are."""

    def __init__(self, settings: AutoWarmup) -> None:
        self._settings = settings
        self._last: torch.Tensor | None = None
        self._changes: dict[int, Callable[[], float]] = {}

    def saw(self, step: int, output: torch.Tensor) -> None:
        """The output of an exact step, ready in order of the current stream. Does not wait."""
        wide = output.detach().to(torch.promote_types(output.dtype, torch.float32), copy=True)
        if self._last is not None:
            change = torch.linalg.vector_norm(wide - self._last) / torch.linalg.vector_norm(wide)
            self._changes[step] = _later(change)
        self._last = wide

    def enough(self, step: int) -> bool:
        """Whether ``step`` need not be exact. Waits for outputs of steps before the last one."""
        known = [change() for k, change in self._changes.items() if k <= step - LATE]
        return len(known) >= 2 and known[-1] <= self._settings.decline * max(known)


def _later(value: torch.Tensor) -> Callable[[], float]:
    """A way to get a number once its device has computed it, without waiting now."""
    if value.device.type != "cuda":
        number = float(value)
        return lambda: number
    host = torch.empty_like(value, device="cpu", pin_memory=True)
    host.copy_(value, non_blocking=True)
    ready = torch.cuda.current_stream(value.device).record_event()

    def get() -> float:
        ready.synchronize()
        return float(host)

    return get
