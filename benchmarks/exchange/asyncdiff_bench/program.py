"""What ranks do in one measured round, as a function that issues one step after another.

A program is written once for all ways to exchange: it is issued on streams, captured in CUDA
graphs, or run by one thread a rank, each of which does its own rank's steps only. The order of the
steps is one in which a single thread can issue them all. A lane is one of the two streams (on the
host: threads) of a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from .links.link import Link

#: A torch.cuda.Stream; None on the host.
Stream = Any


class Step(Protocol):
    """Does ``operation(*args, stream)`` if the rank, and the lane, are the ones at work."""

    def __call__(
        self, rank: int, operation: Callable[..., None], *args: Any, lane: int = 0
    ) -> None: ...

    def fork(self, rank: int) -> None:
        """Lane 1 begins when lane 0 has come this far."""

    def join(self, rank: int) -> None:
        """Lane 0 goes on when lane 1 has come this far."""


Program = Callable[[Step], None]


def receive(step: Step, link: Link, n: int, lane: int = 0) -> None:
    """Every receiver takes bundle n, and gives its slot back."""
    for rank in link.receivers:
        step(rank, link.receive, rank, n, lane=lane)
        step(rank, link.release, rank, n, lane=lane)


def signal(step: Step, link: Link, send_lane: int = 0, receive_lane: int = 0) -> None:
    """One tiny bundle for each slot of ``link``, so that a program ends where it began."""
    for n in range(link.slots):
        step(link.sender, link.send, n, lane=send_lane)
        receive(step, link, n, receive_lane)


def ping_pong(there: Link, back: Link, count: int) -> Program:
    """A bundle goes and comes back, ``count`` times; ``back`` sends what ``there`` brought.

    Slots are released after the next bundle has been sent: that is not part of a bundle's way.
    """

    def program(step: Step) -> None:
        here, far = there.sender, back.sender
        step(here, there.send, 0)
        for n in range(count):
            step(far, there.receive, far, n)
            step(far, back.send, n)
            step(far, there.release, far, n)
            step(here, back.receive, here, n)
            if n + 1 < count:
                step(here, there.send, n + 1)
            step(here, back.release, here, n)

    return program


def back_to_back(link: Link, acknowledge: list[Link], count: int) -> Program:
    """``count`` bundles one after another; at the end every receiver says that it has them all."""

    def program(step: Step) -> None:
        for n in range(count):
            step(link.sender, link.send, n)
            receive(step, link, n)
        for answer in acknowledge:
            signal(step, answer)

    return program


def both_ways(there: Link, back: Link, go: Link, acknowledge: Link, count: int) -> Program:
    """``count`` bundles in each direction at once; rank 0 says when, and hears that all came."""

    def program(step: Step) -> None:
        signal(step, go)
        if there.grouped:
            # One call for both directions: two calls on one communicator would wait for each
            # other.
            for n in range(count):
                for mine, other in ((there, back), (back, there)):
                    step(mine.sender, mine.send_and_receive, other, n)
            signal(step, acknowledge)
            return
        for rank in (there.sender, back.sender):
            step.fork(rank)
        for n in range(count):
            for link in (there, back):
                step(link.sender, link.send, n)
                receive(step, link, n, lane=1)
        for rank in (there.sender, back.sender):
            step.join(rank)
        signal(step, acknowledge)

    return program
