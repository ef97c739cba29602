"""The pipeline schedule: components work on different pictures of a batch, in turn.

The batch of a call is cut into micro-batches (GPipe: Huang et al., arXiv 1811.06965), and every
step of each is exact: nothing is stale. What makes it a pipeline is the order: while component 1
runs micro-batch 0, component 0 runs micro-batch 1. The next step of a micro-batch waits for its own
noise prediction only, so that ranks do not run dry between steps where there are as many
micro-batches as ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from .actions import Tick


def in_turn(ticks: Iterable[Tick], microbatches: int) -> tuple[Tick, ...]:
    """A tick for each micro-batch in place of every one of these exact ``ticks``. Micro-batches
    have channels of their own, so that each one's bundles are counted by themselves."""
    return tuple(
        replace(tick, index=tick.index * microbatches + m, microbatch=m)
        for tick in ticks
        for m in range(microbatches)
    )
