"""A process that measures: all ranks in it, or one of several processes with a rank each.

python -m asyncdiff_bench.worker JOB RANK    # RANK -1: all ranks

Started by ``runner``, which reads the lines of JSON that this writes and ends it if it hangs.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from .settings import Settings

_SECONDS = 60  # that processes wait for each other
_GO = 3600  # that they wait for their turn

#: NVLink multicast can put the GPUs of a host out of service where they are shared, and nothing
#: here needs it.
ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}


#: A case and a way.
Pair = tuple[str, str]


@dataclass(frozen=True)
class Job:
    """``pairs`` of case and way, in order; ``out`` takes the lines of JSON; ``port`` of the store
    at which several processes meet, and wait for "go" (0: one process)."""

    settings: Settings
    pairs: tuple[Pair, ...]
    out: str
    port: int = 0

    def write(self, path: Path) -> None:
        """To be read by :meth:`read`."""
        path.write_text(json.dumps(asdict(self) | {"settings": self.settings.to_dict()}))

    @classmethod
    def read(cls, path: Path) -> Job:
        """The inverse of :meth:`write`."""
        data = json.loads(path.read_text())
        settings = Settings.from_dict(data.pop("settings"))
        pairs = tuple((case, way) for case, way in data.pop("pairs"))
        return cls(settings, pairs, **data)


def run(job: Job, rank: int) -> None:
    """Measure all pairs. Only the process with rank 0 writes."""
    from .bench import Bench
    from .cases import CASES
    from .figures import Figure
    from .ways import known

    cases = {c.key: c for c in CASES}
    ways = known()
    with _world(job, rank) as world, open(job.out if rank <= 0 else os.devnull, "a") as out:

        def say(kind: str, data: Any) -> None:
            out.write(json.dumps({kind: data}) + "\n")
            out.flush()

        bench = Bench(world, job.settings, time.time() + job.settings.seconds)
        for case, way in job.pairs:
            for item in cases[case].run(bench, ways[way]):
                say("figure" if isinstance(item, Figure) else "left_out", item.to_dict())
            say("done", [case, way])


@contextmanager
def _world(job: Job, rank: int) -> Iterator[Any]:
    machine = job.settings.machine
    if not machine.cuda:
        from .host_world import HostWorld

        host = HostWorld(machine)
        yield host
        host.close()
        return
    from .cuda_world import CudaWorld

    if not job.port:
        world = CudaWorld(machine)
        yield world
        world.close()
        return
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    import asyncdiff_core as core

    processes = len(machine.devices)
    device = torch.device(machine.devices[rank])
    wait = timedelta(seconds=_SECONDS)
    store = TCPStore("127.0.0.1", job.port, is_master=False, timeout=timedelta(seconds=_GO))
    store.get("go")  # until then the GPUs belong to others
    store.set_timeout(wait)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl",
        store=PrefixStore("torch", store),
        rank=rank,
        world_size=processes,
        timeout=wait,
        device_id=device,
    )
    meeting = core.StoreRendezvous(store, rank, processes, prefix="bench")
    world = CudaWorld(machine, [rank], meeting)
    yield world
    world.synchronize()


def main() -> None:
    code = 0
    try:
        run(Job.read(Path(sys.argv[1])), int(sys.argv[2]))
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Taking down process groups whose work was captured may wait for ever; all is written.
    os._exit(code)


if __name__ == "__main__":
    main()
