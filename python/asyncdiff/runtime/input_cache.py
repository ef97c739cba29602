"""Which of a call's conditioning is new: so that a generation copies its embeddings once, and rows
of timesteps that depend on them are computed again only when their values are others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..graph.writes import Seen, Writes


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
        #: what that was, and the caller's tensors that are known to be the same
        self._held: dict[int, torch.Tensor] = {}
        self._met: dict[int, Seen] = {}
        #: the caller's tensors that the ranks have a copy of
        self._seen: dict[int, Seen] = {}
        self._writes = Writes()

    def begin(self, tensors: Sequence[torch.Tensor]) -> None:
        """A generation begins, whose first call has these tensors: the ranks hold none of them.

        Values that rows depend on are compared with those of the generation before. On CUDA the
        host waits for that, here and not later.
        """
        self._met.clear()
        self._seen.clear()
        self._writes.clear()
        self._renew(dict(enumerate(tensors)), compare=True)

    def changed(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        """Places of what is not what the ranks hold: they have to be given it now. A tensor is
        known by itself and by whether it was written to: see :mod:`~asyncdiff.graph.writes`."""
        changed = []
        first = not self._seen
        for i in self._indices:
            if not self._writes.same(tensors[i], self._seen.get(i)):
                changed.append(i)
                self._seen[i] = Seen(tensors[i])
        self._renew({i: tensors[i] for i in changed}, compare=first)
        return changed

    def check(self) -> None:
        """Raise InputError if a tensor that was taken for what the ranks hold was not. Call it when
        the device is idle, after a generation's last step."""
        self._writes.check()

    def forget(self) -> None:
        """What rows were computed with is not known any more: none of them fits."""
        self.version += 1
        self._held.clear()

    def _renew(self, changed: Mapping[int, torch.Tensor], compare: bool) -> None:
        """Begin a new version if rows of the ranks' tables depend on tensors that have changed;
        without ``compare`` all of them have, unless they are known."""
        mine = {i: t for i, t in changed.items() if i in self._of_rows}
        mine = {i: t for i, t in mine.items() if not self._writes.same(t, self._met.get(i))}
        self._met |= {i: Seen(t) for i, t in mine.items()}
        if not mine or (compare and all(_same(t, self._held.get(i)) for i, t in mine.items())):
            return
        self.version += 1
        self._held |= {i: t.clone() for i, t in mine.items()}


def _same(new: torch.Tensor, old: torch.Tensor | None) -> bool:
    return old is not None and new.device == old.device and torch.equal(new, old)
