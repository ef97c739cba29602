"""The list of devices: one entry a rank, checked before anything runs on it; their memory."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch

import asyncdiff_core as core

from ..config import GROUPS, Devices, ParallelConfig
from ..errors import DeviceError


def devices_of(config: ParallelConfig) -> list[torch.device]:
    """The devices of all ranks that a configuration asks for: see :func:`resolve`."""
    if config.guidance != "split":
        return resolve(config.devices, config.ranks)
    published = config.schedule == "asyncdiff"
    why = f"2 x {'(components + stride - 1)' if published else 'components'}"
    return resolve(config.devices, GROUPS * config.ranks, why)


def resolve(
    devices: Devices, ranks: int, why: str = "components + stride - 1"
) -> list[torch.device]:
    """One ``torch.device`` with an index for each of ``ranks`` ranks, as ``why`` explains.

    None takes all visible GPUs, or the CPU where there is none; where there are fewer GPUs than
    ranks, they are taken round robin. Raises DeviceError, saying what to change, for a list of the
    wrong length, a device that does not exist, or CPU and CUDA mixed.
    """
    if devices is None:
        return _default(ranks)
    if isinstance(devices, (str, int, torch.device)):
        named = [d.strip() for d in devices.split(",")] if isinstance(devices, str) else [devices]
        instead = f"{named}" if len(named) > 1 else f"{named} * {ranks}"
        raise DeviceError(f"devices is a list with one entry a rank; write {instead}")
    out = [_device(d) for d in devices]
    if len(out) != ranks:
        raise DeviceError(
            f"{len(out)} devices for {ranks} ranks: {why} = {ranks} entries are "
            f"needed (entries may repeat, as in [{str(out[0]) if out else 'cpu'!r}] * {ranks})"
        )
    kinds = {d.type for d in out}
    if len(kinds) > 1:
        raise DeviceError(f"devices mixes {' and '.join(sorted(kinds))}: take one kind for all")
    if kinds == {"cuda"}:
        _check_cuda(out)
    return out


def every_device(devices: Devices) -> list[torch.device]:
    """The devices that may be used, as they are given; None: all visible GPUs, else the CPU.
    Raises DeviceError as :func:`resolve` does."""
    if devices is None:
        count = torch.cuda.device_count() if core.cuda_built() else 0
        return resolve(None, max(1, count))
    if isinstance(devices, (str, int, torch.device)):
        return resolve(devices, 1)
    return resolve(devices, len(devices))


def fabric(devices: Sequence[torch.device], deadline: float | None) -> core.Fabric:
    """What ranks on these devices exchange through.

    ``deadline`` in seconds; None takes ``ASYNCDIFF_DEADLINE``, else 10. Raises DeviceError for what
    the core says of devices, such as GPUs that do not reach each other as ``ASYNCDIFF_TRANSPORT``
    wants.
    """
    if devices[0].type == "cpu":
        return core.HostFabric(len(devices), deadline=deadline)
    try:
        return core.CudaFabric([d.index for d in devices], deadline=deadline)
    except core.DeviceError as e:
        raise DeviceError(str(e)) from e


def _default(ranks: int) -> list[torch.device]:
    count = torch.cuda.device_count() if torch.cuda.is_available() and core.cuda_built() else 0
    if count == 0:
        return [torch.device("cpu")] * ranks
    return [torch.device("cuda", i % count) for i in range(ranks)]


def _device(entry: str | int | torch.device) -> torch.device:
    try:
        device = torch.device("cuda", entry) if isinstance(entry, int) else torch.device(entry)
    except RuntimeError as e:
        raise DeviceError(f"{entry!r} is not a device: write 'cpu', 'cuda:0', …") from e
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"{entry!r}: ranks run on 'cpu' or 'cuda:<n>'")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", 0)
    return torch.device("cpu") if device.type == "cpu" else device


def _check_cuda(devices: Sequence[torch.device]) -> None:
    wanted = max(d.index for d in devices)
    if not torch.cuda.is_available():
        raise DeviceError(
            f"devices asks for cuda:{wanted}, but torch sees no GPU here "
            "(torch.cuda.is_available() is False): use ['cpu'] entries, or see `asyncdiff doctor`"
        )
    count = torch.cuda.device_count()
    if wanted >= count:
        raise DeviceError(
            f"devices asks for cuda:{wanted}, but there are {count} GPUs (0 … {count - 1})"
        )
    if not core.cuda_built():
        raise DeviceError(
            "asyncdiff_core was built without CUDA: install nvcc and reinstall with "
            "ASYNCDIFF_CUDA=on"
        )


# ---- memory --------------------------------------------------------------------------------------

#: How CUDA, its libraries and torch's allocator for the host say it, where the type does not.
_SAID = (
    "cudaErrorMemoryAllocation",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "STATUS_ALLOC_FAILED",
    "can't allocate memory",
)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that a device or the host has no memory left."""
    if error is None:
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = isinstance(error, (RuntimeError, core.CoreError)) and any(s in str(error) for s in _SAID)
    return said or out_of_memory(error.__cause__)


def collect() -> None:
    """Give back what closed engines had: programs refer to themselves, and torch keeps memory."""
    gc.collect()
    torch.cuda.empty_cache()
