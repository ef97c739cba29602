"""Denoisers of families in their first call, and sequence-parallel graphs run in the threads of one
process, as ranks would."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import fx

from asyncdiff.graph.capture import Captured, capture
from asyncdiff.graph.signature import Call, parse
from asyncdiff.sequence.program import program
from asyncdiff.sequence.sharding import Sharding
from asyncdiff.sequence.shares import Shares


class _Stop(Exception):
    pass


@cache
def of_family(name: str) -> tuple[Captured, Call, list[torch.Tensor]]:
    """A family's denoiser in its first call, and what it returns."""
    pipe, args = FAMILIES[name]()
    module, given = pipe.transformer, {}

    def look(*args: Any, **kwargs: Any) -> Any:
        given["call"] = args, kwargs
        raise _Stop

    module.forward, plain = look, module.forward
    with pytest.raises(_Stop):
        pipe(**args)
    del module.forward
    positional, named = given["call"]
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(plain(*positional, **named))
    call = parse(module, positional, named)
    return capture(module, call), call, [x for x in expected if isinstance(x, torch.Tensor)]


class Gatherer:
    """All-gathers between so many threads, in the order in which each of them asks."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=60)
        self.parts: list[Any] = [None] * ranks
        self.count = 0

    def of(self, rank: int) -> Any:
        def gather(local: torch.Tensor, dim: int) -> torch.Tensor:
            self.parts[rank] = local
            self.barrier.wait()
            out = torch.cat(self.parts, dim)
            self.count += rank == 0
            self.barrier.wait()
            return out

        return gather


def run(
    captured: Captured, sharding: Sharding, shares: Shares, values: Sequence[torch.Tensor]
) -> tuple[list[list[Any]], Gatherer]:
    """The outputs of every rank, whose inputs are the values of the placeholders."""
    ranks = shares.ranks
    gatherer = Gatherer(ranks)
    out: list[Any] = [None] * ranks
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            graph = program(captured, sharding, rank, shares, gatherer.of(rank))
            with torch.no_grad():
                out[rank] = list(fx.Interpreter(captured.root, graph=graph).run(*values))
        except BaseException as e:
            errors.append(e)
            gatherer.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return out, gatherer
