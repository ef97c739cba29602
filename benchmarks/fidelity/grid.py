"""The rows of the fidelity benchmark."""

from __future__ import annotations

from collections.abc import Iterator

from fidelity.method import Method
from fidelity.ours import Asynchronous

#: Exact steps.
WARMUPS = (1, 3, 5, 9)
#: (components, stride).
SHAPES = ((2, 1), (3, 1), (4, 1), (2, 2), (3, 2))


def methods(device: str, sampler: str, steps: int, quick: bool) -> Iterator[Method]:
    """Every row for this sampler; ``quick``: one of each kind."""
    shapes = SHAPES[:1] if quick else SHAPES
    warmups = WARMUPS[:1] if quick else WARMUPS
    for n, s in shapes:
        for w in warmups:
            yield Asynchronous(f"asyncdiff N={n} S={s} w={w}", device, n, s, w)
