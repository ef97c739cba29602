"""The layout of what a component needs of its timestep alone: a row.

Time embeddings and what blocks make of them (of pooled text too, in many denoisers) do not depend
on the latents. All such values of a component lie packed in one piece of memory, so that going from
one timestep to another is one copy.
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


def padded(nbytes: int) -> int:
    """Bytes that a value of ``nbytes`` takes in a row."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


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
