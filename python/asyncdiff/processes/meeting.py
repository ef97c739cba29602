"""Rounds in which the processes of a group give bytes and get everybody's, over their store.

Keys begin with a word that process 0 draws anew for every meeting, so that neither a second meeting
on one store nor a restart on a store that lives on reads what an earlier one left. Every wait has
an end: see :meth:`Meeting.all_gather`.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ..errors import MismatchError, ProcessError
from .group import Membership
from .liveness import Liveness, identity

#: Seconds between two looks at the store: at first, and at most.
_SOON, _LATE = 2e-4, 1e-2
#: Seconds between two looks at who is alive.
_LOOK = 0.1
#: Of a deadline, how often a process that has much to do says that it lives; and for how many
#: seconds it may say so.
_BEATS, _BUSY = 5, 3600.0
_T = TypeVar("_T")
#: What differs where processes do not make the same call.
_CALL = "the call"


class Meeting:
    """What the processes of ``membership`` say to each other; a rendezvous of asyncdiff_core, too.

    ``deadline``: seconds that a round may wait for a process that does not say that it is busy.
    ``patience``: seconds to wait for everybody to come, here. Raises ProcessError where somebody
    does not.
    """

    def __init__(self, membership: Membership, deadline: float, patience: float) -> None:
        self.process, self.processes = membership.process, membership.processes
        self._store = membership.store
        self._deadline = deadline
        self._round = 0
        self._lost: ProcessError | None = None
        self._liveness: Liveness | None = None
        #: what this process is about to do together with the others
        self._what = "meet"
        self._beating = 0
        self._stem = ""
        self._stem = self._guarded(self._receive_all if self.process == 0 else self._come, patience)
        everybody = [json.loads(x) for x in self._gather("meet", json.dumps(identity()).encode())]
        #: of each process
        self.hosts: list[str] = [who["host"] for who in everybody]
        self._liveness = Liveness(everybody, self.process)

    # ---- rounds ------------------------------------------------------------------------------

    def all_gather(self, mine: bytes) -> list[bytes]:
        """Everybody's bytes, in order of process. See :meth:`gather`."""
        return self.gather(self._what, mine)

    @contextlib.contextmanager
    def about_to(self, what: str) -> Iterator[None]:
        """What is gathered meanwhile, by whoever it is, belongs to this."""
        before, self._what = self._what, what
        try:
            yield
        finally:
            self._what = before

    def gather(self, what: str, mine: bytes, last: bool = False) -> list[bytes]:
        """Everybody's bytes for ``what``, in order of process. All processes call it equally often,
        in the same order.

        Raises ProcessError, which names the process, where one has ended, or neither comes within
        the deadline nor says that it is busy, MismatchError where one is about to do something
        else. After either nothing is gathered any more. ``last``: the process may end, and with it
        the store, when it has returned: process 0 waits until all others have read.
        """
        return self._guarded(self._gather, what, mine, last)

    def check(self) -> None:
        """Raise ProcessError where a process is known to be gone, without waiting."""
        if self._lost is None and self._liveness is not None:
            for process in self._liveness.ended():
                self._lost = ended(process)
        self._refuse()

    def close(self) -> None:
        """Meet no more."""
        if self._lost is None:
            self._lost = ProcessError(self.process, "this denoiser is closed")
        if self._liveness is not None:
            self._liveness.close()

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """This process has much to do, of which the others know nothing: they wait longer."""
        self._beating += 1
        if self._beating > 1:
            try:
                yield
            finally:
                self._beating -= 1
            return
        stop = threading.Event()
        thread = threading.Thread(target=self._beat, args=(stop,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._beating -= 1
            stop.set()
            thread.join(self._deadline)

    def _beat(self, stop: threading.Event) -> None:
        end = time.monotonic() + _BUSY
        count = 0
        while time.monotonic() < end:
            with contextlib.suppress(Exception):  # the waiting ones will know
                self._store.set(f"{self._stem}/beat/{self.process}", str(count))
            count += 1
            if stop.wait(self._deadline / _BEATS):
                return

    def _refuse(self) -> None:
        if self._lost is not None:
            raise ProcessError(self._lost.rank, str(self._lost)) from self._lost

    def _guarded(self, work: Callable[..., _T], *args: Any) -> _T:
        """What ``work`` returns; where it fails, nobody meets here any more."""
        # Not whether all are alive: who has ended may have come here before.
        self._refuse()
        try:
            return work(*args)
        except MismatchError:  # found by all of them, in the same round
            raise
        except ProcessError as e:
            self._give_up(e)
            raise
        except BaseException as e:
            error = self._cause(e)
            self._give_up(error)
            if isinstance(e, Exception):
                raise error from e
            raise  # whoever interrupts a wait

    def _gather(self, what: str, mine: bytes, last: bool = False) -> list[bytes]:
        stem, before = f"{self._stem}/{self._round}", f"{self._stem}/{self._round - 2}"
        self._round += 1
        self._store.set(f"{stem}/{self.process}", what.encode() + b"\0" + mine)
        keys = [f"{stem}/{p}" for p in range(self.processes)]
        self._wait(dict(enumerate(keys)), self._deadline, what)
        found = [bytes(self._store.get(key)).partition(b"\0") for key in keys]
        # Everybody has written the round before, and so has read the one before that.
        if self._round > 2:
            with contextlib.suppress(Exception):
                self._store.delete_key(f"{before}/{self.process}")
        if last:
            self._leave(f"{stem}/read", what)
        for process, (theirs, _, _) in enumerate(found):
            if theirs != what.encode():
                other = theirs.decode(errors="replace")
                raise MismatchError(
                    process,
                    _CALL,
                    f"processes make different calls: process {process} is about to {other}, "
                    f"process {self.process} to {what}. All processes of a group make the same "
                    "calls in the same order",
                )
        return [bytes(value) for _, _, value in found]

    def _leave(self, stem: str, what: str) -> None:
        """Process 0, in which the store may be, is the last one to leave a round."""
        if self.process != 0:
            with contextlib.suppress(Exception):
                self._store.set(f"{stem}/{self.process}", b".")
            return
        keys = {p: f"{stem}/{p}" for p in range(1, self.processes)}
        self._wait(keys, self._deadline, what)
        for key in keys.values():
            with contextlib.suppress(Exception):
                self._store.delete_key(key)

    def _wait(self, keys: dict[int, str], seconds: float, what: str) -> None:
        """Until the key of every process is there."""
        pause, looked = _SOON, time.monotonic()
        signs = dict.fromkeys(keys, looked)
        beats: dict[int, bytes] = {}
        while keys and not self._store.check(list(keys.values())):
            now = time.monotonic()
            if now - looked > _LOOK:
                looked = now
                missing = [p for p, key in keys.items() if not self._store.check([key])]
                for process in missing:
                    self._look(process, beats, signs, now)
                late = [p for p in missing if now - signs[p] > seconds]
                if late:
                    raise ProcessError(
                        late[0],
                        f"process {late[0]} of the group did not come within {seconds:g} s, where "
                        f"all processes have to {what}. Whoever makes fewer calls than others, or "
                        "is stuck, is waited for no longer: deadline= sets how long",
                    )
            time.sleep(pause)
            pause = min(1.5 * pause, _LATE)

    def _look(
        self, process: int, beats: dict[int, bytes], signs: dict[int, float], now: float
    ) -> None:
        """Notice a sign of life of a process that is missing, or the lack of one."""
        if self._liveness is not None and process in self._liveness.ended():
            raise ended(process)
        given_up = f"{self._stem}/lost"
        if self._store.check([given_up]):
            # Of several that are missing one may wait no longer because of another.
            rank, _, text = bytes(self._store.get(given_up)).decode().partition(" ")
            raise ProcessError(int(rank), text)
        beat = f"{self._stem}/beat/{process}"
        if self._store.check([beat]):
            value = bytes(self._store.get(beat))
            if beats.setdefault(process, value) != value:
                beats[process], signs[process] = value, now

    def _cause(self, e: BaseException) -> ProcessError:
        """What it means that the store fails, or that a wait was interrupted."""
        if not isinstance(e, Exception):
            return ProcessError(
                self.process, f"process {self.process} was interrupted while all had to meet"
            )
        gone = sorted(self._liveness.ended()) if self._liveness is not None else []
        if gone:
            return ended(gone[0])
        return ProcessError(
            0,
            "the group's store does not answer any more; the process that it is in, mostly process "
            f"0, may have ended ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''})",
        )

    def _give_up(self, error: ProcessError) -> None:
        self._lost = error
        if self._stem:
            with contextlib.suppress(Exception):
                self._store.set(f"{self._stem}/lost", f"{error.rank} {error}")

    # ---- coming together ---------------------------------------------------------------------

    def _receive_all(self, patience: float) -> str:
        """Process 0: wait for all others; the word that keys begin with."""
        end = time.monotonic() + patience
        others = range(1, self.processes)
        stem, seen = "", None
        while True:
            tokens = {p: self._found(f"hello/{p}") for p in others}
            if None not in tokens.values() and tokens != seen:
                # Also where one comes again, after an attempt that failed.
                seen, stem = tokens, f"asyncdiff-{secrets.token_hex(8)}"
                word = json.dumps([stem, *tokens.values()])
                self._store.set("asyncdiff/welcome", word)
            here = [f"{stem}/here/{p}" for p in others]
            if stem and (not here or self._store.check(here)):
                self._store.set(f"{stem}/begin", b".")
                for p in others:
                    self._store.delete_key(f"asyncdiff/hello/{p}")
                return stem
            if time.monotonic() > end:
                missing = [p for p in others if tokens[p] is None]
                missing += [p for p in others if not self._store.check([f"{stem}/here/{p}"])]
                raise absent(missing[0], patience)
            time.sleep(_LATE)

    def _come(self, patience: float) -> str:
        """Another process: tell process 0 that it is here; the word that keys begin with."""
        end = time.monotonic() + patience
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
                raise absent(missing[0] if missing else 0, patience)
            time.sleep(_LATE)

    def _found(self, key: str) -> str | None:
        key = f"asyncdiff/{key}"
        return bytes(self._store.get(key)).decode() if self._store.check([key]) else None


def ended(process: int) -> ProcessError:
    """That a process has ended."""
    return ProcessError(
        process,
        f"process {process} of the group has ended: nothing can be computed without its ranks. "
        "Close this denoiser; another group, of the processes that are left or of new ones, works",
    )


def absent(process: int, patience: float) -> ProcessError:
    """That a process did not come to the first meeting."""
    return ProcessError(
        process,
        f"process {process} of the group did not come within {patience:g} s, where all processes "
        "have to make a denoiser of this group: does each of them get there?",
    )
