"""How a batch is cut into parts that ranks take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BatchSplit:
    """A batch of ``conditions`` (guidance's, one after another), each of which is cut into
    ``count`` parts: part i has the i-th of each condition."""

    conditions: int
    count: int

    def part(self, whole: torch.Tensor, index: int) -> torch.Tensor:
        """Part ``index`` of a tensor with rows of the batch, or several of each, along its first
        dimension; a view where there is one condition."""
        if self.conditions == 1:
            return whole.chunk(self.count)[index]
        rows = whole.unflatten(0, (self.conditions, self.count, -1))
        return rows[:, index].flatten(0, 1)

    def parts(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """All parts."""
        return [self.part(whole, index) for index in range(self.count)]

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensor of these parts: the opposite of :meth:`parts`."""
        if self.conditions == 1:
            return torch.cat(list(parts))
        rows = [part.unflatten(0, (self.conditions, -1)) for part in parts]
        return torch.stack(rows, 1).flatten(0, 2)
