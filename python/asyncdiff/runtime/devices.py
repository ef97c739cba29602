"""Where ranks are: a device and a process for each, checked before anything runs there."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import asyncdiff_core as core

from ..config import GROUPS, Devices, ParallelConfig
from ..errors import DeviceError
from ..graph.weights import Weights
from ..processes.team import Team


@dataclass(frozen=True)
class Place:
    """Where a rank is: on ``device`` of a process of the group, whose name for it that is.

    ``unit`` is the piece of hardware, by a name that is the same in all processes; ``host`` the
    number of the process's host; ``kind`` what it is: what is measured on one holds for all.
    """

    process: int
    device: torch.device
    unit: str
    host: int = 0
    kind: str = "CPU"

    def __str__(self) -> str:
        return str(self.device)

    @classmethod
    def here(cls, device: torch.device) -> Place:
        """A place in a process that is alone."""
        return cls(0, device, str(device))


@dataclass(frozen=True)
class Deployment:
    """A denoiser and where it runs, which all of its engines have in common: ``places``, one a
    rank, of the processes of ``team``, and ``seats``, the own place of each process."""

    module: nn.Module
    weights: Weights
    config: ParallelConfig
    places: Sequence[Place]
    team: Team
    seats: Sequence[Place]

    @property
    def own_devices(self) -> list[torch.device]:
        """The devices of this process's ranks."""
        return [p.device for p in self.places if p.process == self.team.process]


def places_of(config: ParallelConfig, team: Team) -> list[Place]:
    """The places that there are for the ranks of a configuration; of a process that is alone, one
    a rank. Collective. Raises DeviceError, saying what to change.

    Of several processes each has those of its own ``devices`` (None: the one device that it uses),
    in order of the processes; there may be more than the configuration takes.
    """
    if not team.several:
        return [replace(Place.here(d), kind=kind_of(d)) for d in devices_of(config)]
    what = "say which devices they use"

    def mine() -> list[list[str]]:
        found = [own_device()] if config.devices is None else every_device(config.devices)
        here = team.hosts[team.process]
        return [[str(d), _unit(d, here), kind_of(d)] for d in found]

    said = team.together(what, mine)
    places = [
        Place(process, torch.device(device), unit, team.hosts[process], kind)
        for process, all_of_it in enumerate(said)
        for device, unit, kind in all_of_it
    ]
    if len({p.device.type for p in places}) > 1:
        raise DeviceError(f"some processes of the group use CPUs, others GPUs: {said_of(places)}")
    by_itself = team.every(what, lambda: config.devices is None)
    units = [p.unit for p in places if p.device.type == "cuda"]
    if by_itself and len(set(units)) < len(units):
        raise DeviceError(
            f"processes of the group use the same GPU: {said_of(places)}. Call "
            "torch.cuda.set_device(…) with another GPU in each of them, or, if they are to share "
            "one, name the devices of each process's own ranks (devices)"
        )
    return places


def check_count(config: ParallelConfig, places: Sequence[Place]) -> None:
    """Raise DeviceError unless a group of several processes has a place for each rank, no more."""
    ranks = rank_total(config)
    if len(places) != ranks:
        raise DeviceError(
            f"the processes of the group have {len(places)} ranks ({said_of(places)}), and these "
            f"settings need {ranks}: take other settings, other processes, or name the devices of "
            "each process's own ranks (devices)"
        )


def rank_total(config: ParallelConfig) -> int:
    """How many ranks a configuration has, in all groups of conditions."""
    return config.ranks * (GROUPS if config.guidance == "split" else 1)


def said_of(places: Sequence[Place]) -> str:
    """Places in words."""
    return ", ".join(f"process {p.process}: {p.device}" for p in places)


def own_device() -> torch.device:
    """The device that this process uses where nothing else is said."""
    if not (torch.cuda.is_available() and core.cuda_built()):
        return torch.device("cpu")
    current = torch.cuda.current_device()
    local = os.environ.get("LOCAL_RANK", "")
    if current == 0 and local.isdecimal() and int(local) < torch.cuda.device_count():
        current = int(local)
    return torch.device("cuda", current)


def _unit(device: torch.device, host: int) -> str:
    # Where torch does not tell, processes of a host have to see the same GPUs under the same names.
    return _uuid(device) or f"{device} of host {host}"


def _uuid(device: torch.device) -> str:
    """The name of a GPU that no other one has, '' where torch does not tell."""
    if device.type != "cuda":
        return ""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))


def uuids_of(places: Sequence[Place], team: Team) -> list[str] | None:
    """The names of GPUs of one host that no others have, in the order of ranks; None where not all
    are GPUs of one host that have such. Collective."""
    if {p.device.type for p in places} != {"cuda"} or len({p.host for p in places}) > 1:
        return None

    def mine() -> list[str]:
        return [_uuid(p.device) for p in places if p.process == team.process]

    found = [name for of in team.together("name their GPUs", mine) for name in of]
    return found if all(found) else None


def kind_of(device: torch.device) -> str:
    """What is alike in devices that are equally fast. All CPUs count as one kind."""
    if device.type != "cuda":
        return "CPU"
    p = torch.cuda.get_device_properties(device)
    return f"{p.name}, {p.multi_processor_count} multiprocessors, {p.total_memory >> 30} GiB"


def devices_of(config: ParallelConfig) -> list[torch.device]:
    """The devices of all ranks that a configuration asks for: see :func:`resolve`."""
    why = "components + stride - 1" if config.schedule == "asyncdiff" else "components"
    if config.guidance != "split":
        return resolve(config.devices, config.ranks, why)
    why = f"2 x ({why})" if "+" in why else f"2 x {why}"
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


def fabric(places: Sequence[Place], deadline: float | None, team: Team) -> core.Fabric:
    """What ranks at these places exchange through. Collective.

    ``deadline`` in seconds; None takes ``ASYNCDIFF_DEADLINE``, else 10. Raises DeviceError for what
    the core says of devices, such as GPUs that do not reach each other as ``ASYNCDIFF_TRANSPORT``
    wants.
    """
    together: dict[str, Any] = {}
    if team.several:
        together = {"owners": [p.process for p in places], "rendezvous": team}
    try:
        with team.collective():
            if places[0].device.type == "cpu":
                return core.HostFabric(len(places), deadline=deadline, **together)
            return core.CudaFabric([p.device.index for p in places], deadline=deadline, **together)
    except core.DeviceError as e:
        raise DeviceError(str(e)) from e


def simulated_link() -> str | None:
    """The link that ranks are made to have (``ASYNCDIFF_LINK``), None where links are as they
    are."""
    return core.simulated_link()


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


#: The share of what is free on a GPU that components may take, as an allocator cannot use
#: everything; and bytes that libraries' workspaces, kernels and CUDA graphs take for themselves.
_USABLE, _BESIDES = 0.92, 256 << 20


def room_on(device: torch.device) -> int | None:
    """Bytes that components may take of a device, in which what torch keeps and does not use counts
    as free; None on CPUs, whose memory is everybody's."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, int(_USABLE * (free + unused)) - _BESIDES)


def room_for(device: torch.device, *weights: Weights) -> int | None:
    """:func:`room_on`, and what these denoisers have there themselves, which is what their
    components take."""
    room = room_on(device)
    return None if room is None else room + sum(w.nbytes_on(device) for w in weights)


def peak_of(device: torch.device) -> int | None:
    """The most bytes that torch's tensors have taken of a GPU; None of a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def collect() -> None:
    """Give back what closed engines had: programs refer to themselves, and torch keeps memory."""
    gc.collect()
    torch.cuda.empty_cache()
