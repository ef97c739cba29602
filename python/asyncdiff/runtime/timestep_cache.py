"""Rows of timesteps that were computed, kept for the steps of a generation."""

from __future__ import annotations

import torch

from ..graph.row import TABLE_BYTES, Row

#: Which row it is: the conditioning that it was computed with, as a number, and the timestep.
Key = tuple[int, float]


def fits(rows: int, nbytes: int) -> bool:
    """Whether a table of so many rows of ``nbytes`` each may be kept."""
    return rows * nbytes <= TABLE_BYTES


class TimestepCache:
    """Packed rows by key: ``memory`` is uint8, slots × bytes of a row."""

    def __init__(self, slots: int, row: Row) -> None:
        self.memory = torch.empty(slots, row.nbytes, dtype=torch.uint8, device=row.memory.device)
        #: which row is in which slot
        self.keys: list[Key | None] = [None] * slots
        self._next = 0

    def find(self, key: Key) -> torch.Tensor | None:
        """The row with this key."""
        return self.memory[self.keys.index(key)] if key in self.keys else None

    def put(self, key: Key, row: torch.Tensor) -> None:
        """Keep a copy of ``row``, in place of the one that was kept first."""
        self.put_at(self._next, key, row)
        self._next = (self._next + 1) % len(self.keys)

    def put_at(self, slot: int, key: Key, row: torch.Tensor) -> None:
        """Keep a copy of ``row`` in this slot."""
        self.memory[slot].copy_(row)
        self.keys[slot] = key
