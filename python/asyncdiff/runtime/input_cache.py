"""Which of a call's conditioning is new: so that a generation copies its embeddings once, and rows
of timesteps that depend on them are computed again only when their values are others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import torch

from ..graph.writes import Seen, Writes
from .step import Caller


class InputCache:
    """The conditioning that an engine's ranks hold, and its *version*: which rows fit it.

    ``indices`` are the places of the conditioning among a call's tensors, ``of_rows`` of what rows
    of some rank depend on.
    """

    def __init__(self, indices: Sequence[int], of_rows: set[int]) -> None:
        self._indices = indices
        self._of_rows = of_rows
        #: counts changes of the conditioning that rows were computed with
        self.version = 0
        #: what that was
        self._held: dict[int, torch.Tensor] = {}
        #: the caller's tensors, as they were when they were looked at last
        self._seen: dict[int, Seen] = {}
        #: whether the ranks hold nothing of this generation yet
        self._first = True
        self._writes = Writes()
        #: where values are compared beside what the caller's stream has to do
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def begin(self, tensors: Sequence[torch.Tensor], ready: Caller | None = None) -> None:
        """A generation begins, whose first call has these tensors: the ranks hold none of them.

        Values that rows depend on are compared with those of the generation before. On CUDA the
        host waits for that, here and not later, and not for what the caller's stream has to do
        since they were ``ready``.
        """
        self._seen.clear()
        self._first = True
        self._writes.clear()
        mine = {i: tensors[i] for i in self._of_rows}
        if mine:
            with contextlib.nullcontext() if ready is None else ready.beside(self._streams):
                self._renew(mine, compare=True)

    def changed(self, tensors: Sequence[torch.Tensor]) -> Sequence[int]:
        """Places of what is not what the ranks hold: they have to be given it now. A tensor is
        known by itself and by whether it was written to: see :mod:`~asyncdiff.graph.writes`."""
        new = {}
        for i in self._indices:
            if not self._writes.same(tensors[i], self._seen.get(i)):
                new[i] = tensors[i]
        first, self._first = self._first, False
        self._renew(new, compare=first)
        return self._indices if first else list(new)

    def check(self) -> None:
        """Raise InputError if a tensor that was taken for what the ranks hold was not. Call it when
        the device is idle, after a generation's last step."""
        self._writes.check()

    def forget(self) -> None:
        """What rows, and what depends on the conditioning alone, were computed with is not known
        any more: none of it fits, and ranks have to be given all of it again."""
        self.version += 1
        self._held.clear()
        self._seen.clear()
        self._first = True

    def _renew(self, new: Mapping[int, torch.Tensor], compare: bool) -> None:
        """Look at tensors, and begin a new version if rows of the ranks' tables depend on them;
        with ``compare`` only if their values are others."""
        self._seen |= {i: Seen(t) for i, t in new.items()}
        rows = {i: t for i, t in new.items() if i in self._of_rows}
        if not rows or (compare and all(_same(t, self._held.get(i)) for i, t in rows.items())):
            return
        self.version += 1
        self._held |= {i: t.clone() for i, t in rows.items()}


def _same(new: torch.Tensor, old: torch.Tensor | None) -> bool:
    return old is not None and new.device == old.device and torch.equal(new, old)
