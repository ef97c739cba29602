"""The benchmark's worker with one rank a process, on the CPU: gloo stands for NCCL.

python exchange_worker.py JOB RANK
"""

from __future__ import annotations

from typing import Any

import fake_cuda
import pytest
import torch.distributed as dist

from asyncdiff_bench import cuda_world, worker
from asyncdiff_bench.cases import exposed
from asyncdiff_bench.machine import Machine


def main() -> None:
    patch = pytest.MonkeyPatch()
    fake_cuda.install(patch)
    patch.setattr(Machine, "cuda", True)
    patch.setattr(Machine, "shared", False)
    # Calls of gloo block: they cannot be captured and replayed here.
    patch.setattr(cuda_world.CudaWorld, "launches", lambda self: ("eager",))
    patch.setattr(exposed, "_WIDTH", 32)
    patch.setattr(exposed, "_TICK", 1e-4)
    start = dist.init_process_group

    def with_gloo(backend: str, **options: Any) -> None:
        assert backend == "nccl"
        del options["device_id"]
        start("gloo", **options)

    patch.setattr(dist, "init_process_group", with_gloo)
    # Ends the process as the worker itself does: gloo's threads may outlive an orderly end.
    worker.main()


if __name__ == "__main__":
    main()
