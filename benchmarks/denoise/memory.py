"""What lies on each GPU."""

from __future__ import annotations

import gc
import os

import torch


class Memory:
    """Bytes of this process that came to lie on each GPU since this was made.

    By the driver's list of processes; where that does not have this one (some containers), what all
    of them have, which is right as long as nobody else is there.
    """

    def __init__(self) -> None:
        self._devices = range(torch.cuda.device_count())
        gc.collect()
        for d in self._devices:
            torch.cuda.synchronize(d)
        if len(self._devices) > 0:
            torch.cuda.empty_cache()
        self._listed = all(_listed(d) is not None for d in self._devices)
        self._used = [self._in_use(d) for d in self._devices]
        self._allocated = [torch.cuda.memory_allocated(d) for d in self._devices]
        for d in self._devices:
            torch.cuda.reset_peak_memory_stats(d)

    def _in_use(self, device: int) -> int:
        if self._listed:
            return _listed(device) or 0
        free, total = torch.cuda.mem_get_info(device)
        return total - free

    def taken(self) -> dict[str, list[float]]:
        """MiB by GPU: ``device`` all that is taken from it, torch's cache included; ``peak`` the
        most that torch's tensors took."""
        pairs = zip(self._devices, self._used, self._allocated, strict=True)
        device, peak = [], []
        for d, used, allocated in pairs:
            device.append(round((self._in_use(d) - used) / 2**20, 1))
            peak.append(round((torch.cuda.max_memory_allocated(d) - allocated) / 2**20, 1))
        return {"device": device, "peak": peak}


def _listed(device: int) -> int | None:
    """Bytes that the driver lists for this process, if it does."""
    try:
        import pynvml
    except ImportError:
        return None
    p = torch.cuda.get_device_properties(device)
    bus = f"{p.pci_domain_id:08x}:{p.pci_bus_id:02x}:{p.pci_device_id:02x}.0"
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByPciBusId(bus)
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return None
    found = (q.usedGpuMemory for q in processes if q.pid == os.getpid())
    return next((int(nbytes) for nbytes in found if nbytes), None)
