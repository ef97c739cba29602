"""What processes of the core's tests do that meet through torch.distributed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.distributed as dist
from core_bundles import read
from core_worker import LAYOUT
from group import Member

import asyncdiff_core as core


def store(member: Member) -> Any:
    """A bundle between two processes that meet over a store."""
    files = dist.FileStore(str(member.folder / "store"), member.processes)
    rendezvous = core.StoreRendezvous(files, member.process, member.processes)
    fabric = core.HostFabric(member.processes, rendezvous=rendezvous)
    channel = fabric.channel(0, [1], LAYOUT)
    if member.process == 0:
        channel.put([np.full(257, 7, np.float32), np.zeros(3, np.int64)], 0)
        return 7.0
    channel.get(1, 0)
    return float(read(channel, 1, 0)[0][0])


def group(member: Member) -> Any:
    """Fabrics from groups of torch.distributed: of all processes, twice, and of the last two."""
    member.group()
    process, processes = member.process, member.processes
    heard = []
    for mark in (b"first", b"second"):
        fabric = core.HostFabric.from_group(deadline=20)
        heard.append([x.decode() for x in fabric.all_gather(mark + b"%d" % process)])
        fabric.close()
    last = dist.new_group([processes - 2, processes - 1])
    text = ""
    if process < processes - 2:
        try:
            core.HostFabric.from_group(last)
        except core.InvalidArgument as e:
            text = str(e)
    else:
        fabric = core.HostFabric.from_group(last)
        heard.append([x.decode() for x in fabric.all_gather(b"%d" % process)])
    dist.barrier()
    dist.destroy_process_group()
    return heard, text
