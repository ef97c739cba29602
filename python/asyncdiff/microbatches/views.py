"""Which batches in parts share memory, and who of them may still be used."""

from __future__ import annotations

import weakref
from typing import Any


class Views:
    """Tensors that share memory, part by part: what is written to one shows in all.

    One that was joined shares memory with the others no longer, but with views of its whole. Nobody
    writes to it then, and once it has such views, to which anybody may write, nobody uses the
    others: nothing is wrong in silence.
    """

    def __init__(self) -> None:
        self._members: list[weakref.ref[Any]] = []
        self._joined = self._seen_whole = False

    def add(self, member: Any) -> None:
        """One more of them."""
        self._members.append(weakref.ref(member))

    def join(self) -> None:
        """One of them is joined."""
        self._joined = True

    def view(self) -> None:
        """There are views of the whole of one of them."""
        self._seen_whole = True

    def check(self, member: Any, writes: bool) -> None:
        """Raise RuntimeError where ``member`` may not be used, or written to, any more."""
        stale = self._seen_whole and member.parts is not None
        if self._joined and (writes or stale) and sum(m() is not None for m in self._members) > 1:
            raise RuntimeError(
                "a part of a batch (schedule='pipeline') is in use after the batch was looked at "
                "as a whole, and might be written to unseen: clone() it first"
            )
