"""What a component needs of its timestep alone: computed once, kept as a row of a table.

Time embeddings and what blocks make of them (of pooled text too, in many denoisers) do not depend
on the latents. All such values of a component lie packed in one piece of memory, a row, so that
going from one timestep to another is one copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

#: Bytes that a rank's table may have. Of the published denoisers the largest, whole on one rank,
#: takes half of it for its usual number of steps; memory is for weights and activations first.
TABLE_BYTES = 256 << 20
#: Bytes that a row may have, so that fifty steps, what most samplers are used with, fit.
ROW_BYTES = TABLE_BYTES // 50
#: Of the values in a row: so much as allocators give, for kernels that choose by alignment.
_ALIGNMENT = 256

#: Which row it is: the conditioning that it was computed with, as a number, and the timestep.
Key = tuple[int, float]


def padded(nbytes: int) -> int:
    """Bytes that a value of ``nbytes`` takes in a row."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def fits(rows: int, nbytes: int) -> bool:
    """Whether a table of so many rows of ``nbytes`` each may be kept."""
    return rows * nbytes <= TABLE_BYTES


class Row:
    """The values of one timestep in memory that stays, where a program reads them.

    ``memory`` is flat uint8; ``values`` are views of it with the shapes, dtypes and dense strides
    of the tensors that it is made for.
    """

    def __init__(self, like: Sequence[torch.Tensor]) -> None:
        sizes = [padded(t.numel() * t.element_size()) for t in like]
        self.memory = torch.zeros(sum(sizes), dtype=torch.uint8, device=like[0].device)
        self.values = []
        begin = 0
        for tensor, size in zip(like, sizes, strict=True):
            part = self.memory[begin : begin + size].view(tensor.dtype)
            self.values.append(part.as_strided(tensor.shape, torch.empty_like(tensor).stride()))
            begin += size

    @property
    def nbytes(self) -> int:
        """Bytes of ``memory``, a multiple of 256."""
        return self.memory.numel()

    def store(self, values: Sequence[torch.Tensor]) -> None:
        """Copy ``values`` here."""
        torch._foreach_copy_(self.values, list(values))


class Timetable:
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
