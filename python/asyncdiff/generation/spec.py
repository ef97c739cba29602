"""What one generation is: the settings, the timesteps, and which steps are exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..config import ParallelConfig
from ..sampling.auto_warmup import AutoWarmup
from ..schedule.plan import EXACT, check_numbers


@dataclass(frozen=True, eq=False)
class GenerationSpec:
    """What one generation is, fixed when it starts.

    ``timesteps`` are the denoiser's own argument values, one a step (or a row a step). The first
    ``warmup`` steps, at the most where ``auto_warmup`` decides, and the last ``exact_tail`` are
    run exactly. Raises PlanError where there are fewer steps than that.
    """

    config: ParallelConfig
    timesteps: torch.Tensor
    warmup: int
    exact_tail: int

    def __post_init__(self) -> None:
        config = self.config
        check_numbers(config.components, config.stride, self.warmup, self.steps, self.exact_tail)

    @classmethod
    def of(
        cls,
        config: ParallelConfig,
        timesteps: Sequence[Any] | torch.Tensor,
        *,
        shorten: bool = False,
    ) -> GenerationSpec:
        """A generation of these settings and timesteps.

        ``shorten``: where there are fewer steps than exact ones, all of them are exact. Else raises
        PlanError for them.
        """
        times = torch.as_tensor(timesteps)
        if config.schedule in EXACT:
            return cls(config, times, max(len(times), 1), 0)
        warmup, tail = config.exact_steps(len(times)), config.exact_tail
        if shorten and warmup + tail > len(times):
            return cls(config, times, max(len(times), 1), 0)
        return cls(config, times, warmup, tail)

    @property
    def steps(self) -> int:
        """T, the number of steps."""
        return len(self.timesteps)

    @property
    def auto_warmup(self) -> AutoWarmup | None:
        """What decides when the exact steps end, if they may end before the last of them."""
        return self.config.auto_warmup if self.warmup < self.steps else None

    @property
    def all_exact(self) -> bool:
        """Whether every step is exact."""
        return self.warmup + self.exact_tail == self.steps

    @property
    def split_steps(self) -> tuple[int, int]:
        """Exact steps at both ends that run split over devices. The last one of the warm-up
        fills the mailboxes: it runs as a chain, unless nothing follows it. So does the first one at
        the end of waves, with which the waves under way arrive."""
        if self.config.exact_mode == "chain":
            return 0, 0
        if self.all_exact:
            return self.steps, 0
        waits = self.config.schedule == "wavefront" and self.exact_tail > 0
        return self.warmup - 1, self.exact_tail - waits
