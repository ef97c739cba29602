"""One of several processes that are killed, one after another: the others go on without it.

    python kill_worker.py ME COUNT FOLDER DEADLINE

Prints a line of JSON for everything that the test has to know.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from core_bundles import receive

import asyncdiff_core as core


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def ring(fabric: core.Fabric, rank: int, rng: random.Random) -> None:
    """Every rank sends to the next one, of a shape that changes."""
    size = rng.randrange(1, 20_000)
    layout = core.Layout([core.TensorSpec("int64", (size,))])
    n = fabric.ranks
    ways = [fabric.channel(r, [(r + 1) % n], layout, slots=2) for r in range(n)]
    before = (rank - 1) % n
    for i in range(rng.randrange(1, 30)):
        ways[rank].put([np.full(size, 100 * rank + i, np.int64)], i % 2)
        (got,) = receive(ways[before], rank, i % 2)
        assert got[0] == got[-1] == 100 * before + i
    for way in ways:
        way.close()


def pair(fabric: core.Fabric, rank: int, rng: random.Random) -> None:
    """Two ranks exchange, the others do not."""
    a, b = rng.sample(range(fabric.ranks), 2)
    count = rng.randrange(1, 5)
    if rank not in (a, b):
        return
    layout = core.Layout([core.TensorSpec("uint8", (1000,))])
    for i in range(count):
        way = fabric.channel(a, [b], layout)
        if rank == a:
            way.put([np.full(1000, i, np.uint8)], 0)
        else:
            assert receive(way, b, 0)[0][0] == i
        way.close()


def gather(fabric: core.Fabric, rank: int, rng: random.Random) -> None:
    fabric.all_gather(bytes(rng.randrange(30_000)))


def reset(fabric: core.Fabric, rank: int, rng: random.Random) -> None:
    fabric.reset(rng.randrange(100))


def live(members: list[int], me: int, epoch: int, folder: Path, deadline: float) -> None:
    """Make fabrics and use them, until one of the members is gone."""
    rank, n = members.index(me), len(members)
    rng = random.Random(epoch)  # the same in all
    for generation in range(1_000_000):
        address = str(folder / f"{epoch}-{generation}")
        # Who learns of a death before the others do waits for them a little longer.
        meeting = core.SocketRendezvous(
            address, rank, n, authkey=b"test", timeout=deadline * (1 + epoch)
        )
        with contextlib.closing(meeting):
            fabric = core.HostFabric(n, deadline=deadline, rendezvous=meeting)
        if generation == 0:
            say(met=epoch)
        try:
            for _ in range(rng.randrange(1, 20)):
                rng.choice([ring, ring, pair, gather, reset])(fabric, rank, rng)
            fabric.all_gather(b"")
        finally:
            fabric.close()


def main() -> None:
    me, count = int(sys.argv[1]), int(sys.argv[2])
    folder, deadline = Path(sys.argv[3]), float(sys.argv[4])
    members = list(range(count))
    epoch = 0
    say(up=me)
    while len(members) > 1:
        try:
            live(members, me, epoch, folder, deadline)
        except (core.ProcessLost, core.CollectiveTimeout) as e:
            who = members[e.process]
            say(lost=who, error=type(e).__name__, epoch=epoch, text=str(e), at=time.time())
            members.remove(who)
            epoch += 1
    core.HostFabric(1).check()
    say(alone=me)


if __name__ == "__main__":
    main()
