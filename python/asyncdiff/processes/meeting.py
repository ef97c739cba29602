"""How the processes of a group come together: over their torch.distributed store.

Keys begin with a word that process 0 draws anew for every meeting, so that neither a second meeting
on one store nor a restart on a store that lives on reads what an earlier one left. Once they have
met, processes talk through shared memory (:class:`~asyncdiff.processes.team.Team`).
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from typing import TypeVar

from ..errors import ProcessError
from .group import Membership

#: Seconds between two looks at the store.
_LOOK = 5e-3
_T = TypeVar("_T")


class Meeting:
    """A rendezvous of asyncdiff_core over the store of ``membership``; nobody is waited for longer
    than ``patience`` seconds at a time. Raises ProcessError where somebody does not come."""

    def __init__(self, membership: Membership, patience: float) -> None:
        self.process, self.processes = membership.process, membership.processes
        self._store = membership.store
        self._patience = patience
        self._round = 0
        self._stem = self._guarded(self._receive if self.process == 0 else self._come)

    def all_gather(self, mine: bytes) -> list[bytes]:
        """Everybody's bytes, in order of process."""
        stem = f"{self._stem}/{self._round}"
        self._round += 1

        def gather() -> list[bytes]:
            # An empty value is none to some stores: the first byte is filler.
            self._store.set(f"{stem}/{self.process}", b"." + mine)
            keys = {p: f"{stem}/{p}" for p in range(self.processes)}
            self._wait(keys)
            return [bytes(self._store.get(key))[1:] for key in keys.values()]

        return self._guarded(gather)

    def _receive(self) -> str:
        """Process 0: wait for all others; the word that keys begin with."""
        end = time.monotonic() + self._patience
        others = range(1, self.processes)
        stem, seen = "", None
        while True:
            tokens = {p: self._found(f"hello/{p}") for p in others}
            if None not in tokens.values() and tokens != seen:
                # Also where one comes again, after an attempt that failed.
                seen, stem = tokens, f"asyncdiff/{secrets.token_hex(8)}"
                self._store.set("asyncdiff/welcome", json.dumps([stem, *tokens.values()]))
            here = [f"{stem}/here/{p}" for p in others]
            if stem and (not here or self._store.check(here)):
                self._store.set(f"{stem}/begin", b".")
                for p in others:
                    self._store.delete_key(f"asyncdiff/hello/{p}")
                return stem
            if time.monotonic() > end:
                missing = [p for p in others if tokens[p] is None]
                missing += [p for p in others if not self._store.check([f"{stem}/here/{p}"])]
                raise self._absent(missing[0])
            time.sleep(_LOOK)

    def _come(self) -> str:
        """Another process: tell process 0 that it is here; the word that keys begin with."""
        end = time.monotonic() + self._patience
        token, answered = secrets.token_hex(8), ""
        self._store.set(f"asyncdiff/hello/{self.process}", token)
        while True:
            word = self._found("welcome")
            stem, *tokens = json.loads(word) if word else ("", "")
            if len(tokens) >= self.process and tokens[self.process - 1] == token:
                if stem != answered:
                    answered = stem
                    self._store.set(f"{stem}/here/{self.process}", b".")
                if self._store.check([f"{stem}/begin"]):
                    return stem
            if time.monotonic() > end:
                others = range(1, self.processes)
                missing = [p for p in others if self._found(f"hello/{p}") is None]
                raise self._absent(missing[0] if missing else 0)
            time.sleep(_LOOK)

    def _found(self, key: str) -> str | None:
        key = f"asyncdiff/{key}"
        return bytes(self._store.get(key)).decode() if self._store.check([key]) else None

    def _wait(self, keys: dict[int, str]) -> None:
        """Until the key of every process is there."""
        end = time.monotonic() + self._patience
        while not self._store.check(list(keys.values())):
            if time.monotonic() > end:
                missing = (p for p, key in keys.items() if not self._store.check([key]))
                raise self._absent(next(missing, 0))
            time.sleep(_LOOK)

    def _guarded(self, work: Callable[[], _T]) -> _T:
        try:
            return work()
        except RuntimeError as e:  # of the store; ProcessError is one, too
            if isinstance(e, ProcessError):
                raise
            raise ProcessError(
                0,
                "the group's store does not answer; the process that it is in, mostly process 0, "
                f"may have ended ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''})",
            ) from e

    def _absent(self, process: int) -> ProcessError:
        return ProcessError(
            process,
            f"process {process} of the group did not come within {self._patience:g} s, where all "
            "processes have to make a denoiser of this group: does each of them get there?",
        )
