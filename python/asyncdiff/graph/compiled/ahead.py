"""Pieces of all components compiled at the same time, before each component is."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from ...turns import Turn
from ..capture import Captured
from ..program import on_device
from . import settings
from .compile import Pieces, compile_kind, compiled_before
from .kinds import Kind, Layout
from .pool import Pool, default_count, threads_of
from .regions import repeated
from .transport import NotSentError, packed

log = logging.getLogger("asyncdiff")

#: After so many of them pieces are compiled one after another.
_FAILURES = 3


class Compiling:
    """How components are compiled on these devices: "whole", or with regions of their own
    ("regions", which True is), if at all; and by how many processes besides this one (None: as many
    as suit one of ``beside`` processes of this host that all prepare)."""

    def __init__(
        self,
        way: bool | str | None,
        devices: Sequence[torch.device],
        processes: int | None = None,
        beside: int = 1,
    ) -> None:
        self._whole = way == "whole"
        if not way:
            processes = 0
        elif processes is None:
            processes = default_count(beside)
            if self._whole:  # few pieces, with many kernels each
                processes //= 2
        self._count = processes
        self._pool = Pool(processes, threads_of(processes, beside), [str(d) for d in devices])

    def start(self) -> None:
        """Start the processes, if there are any, without waiting until they are ready."""
        if self.side_by_side:
            self._pool.start()

    def close(self) -> None:
        """End the processes. They start again where they are needed again."""
        self._pool.close()

    @property
    def side_by_side(self) -> bool:
        """Whether there are processes that compile."""
        return self._count > 0 and settings.kept()

    def regions(self, captured: Captured) -> Mapping[str, int]:
        """What is compiled by itself."""
        return {} if self._whole else repeated(captured)

    @torch.no_grad()
    def ahead(self, components: Sequence[Pieces]) -> None:
        """Have the processes compile what neither this process nor inductor's cache on the disk
        has, and take that from there. The components were looked at (:meth:`~Pieces.look`). What
        other such processes are at is left for later, when it is waited for, and so is what the
        processes cannot compile: logs one line at most. Raises where memory lacks."""
        kinds: dict[Kind, fx.GraphModule] = {}
        for component in components:
            kinds = component.kinds | kinds
        jobs = _jobs({kind: kinds[kind] for kind in kinds if not compiled_before(kind)})
        with contextlib.ExitStack() as undo:
            turns = {
                kind: undo.enter_context(contextlib.closing(Turn(kind.turn()))) for kind in jobs
            }
            mine = [k for k, turn in turns.items() if turn.take() and not compiled_before(k)]
            if len(mine) >= 2:
                self._compile(components, kinds, {kind: jobs[kind] for kind in mine}, turns)

    def _compile(
        self,
        components: Sequence[Pieces],
        kinds: Mapping[Kind, fx.GraphModule],
        jobs: Mapping[Kind, bytes],
        turns: Mapping[Kind, Turn],
    ) -> None:
        self._pool.start()
        done = {kind for kind in kinds if compiled_before(kind)}
        reasons = []
        for kind, error in self._pool.compile(jobs):
            if error:
                turns[kind].close()
                reasons.append(error)
                continue
            kind.note()
            turns[kind].close()
            before = _misses()
            with on_device(kind.device):
                compile_kind(kind, kinds[kind])
            done.add(kind)
            for component in components:
                component.ready(done)
            if _misses() > before:
                reasons.append("what other processes compile is not found in inductor's cache")
                if len(reasons) >= _FAILURES:
                    break
        if reasons:
            log.warning("pieces are compiled one after another, which is slower: %s", reasons[0])


def _jobs(kinds: Mapping[Kind, fx.GraphModule]) -> dict[Kind, bytes]:
    """Those that can be sent, largest first; what differs from another one in its device alone
    after all others, since by then the other one's kernels are there."""
    seen: set[object] = set()
    order = []
    for kind, piece in kinds.items():
        if not all(isinstance(x, Layout) for x in kind.given):
            continue
        again = kind.elsewhere in seen
        seen.add(kind.elsewhere)
        order.append((again, -len(piece.graph.nodes), kind))
    jobs = {}
    for _, _, kind in sorted(order, key=lambda x: x[:2]):
        try:
            jobs[kind] = packed(kinds[kind], kind.given)
        except NotSentError as e:
            log.debug("a piece is compiled in this process: %s", e)
    return jobs


def _misses() -> int:
    from torch._dynamo.utils import counters

    found = counters["inductor"]
    return int(found["fxgraph_cache_miss"] + found["fxgraph_cache_bypass"])
