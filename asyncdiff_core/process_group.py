"""A process group of torch.distributed as a rendezvous. torch is imported when this is used."""

from __future__ import annotations

from typing import Any

from .errors import InvalidArgument
from .rendezvous import StoreRendezvous


def rendezvous_of(group: Any) -> StoreRendezvous:
    """Over the store of ``group`` (None: of all processes). Raises InvalidArgument for what is no
    group that this process is in."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise InvalidArgument("there are no groups before torch.distributed.init_process_group")
    if group is None:
        group = dist.group.WORLD
    if group == dist.GroupMember.NON_GROUP_MEMBER:  # a number, which new_group() gives outsiders
        raise InvalidArgument("this process is not in the group")
    if not isinstance(group, dist.ProcessGroup):
        raise InvalidArgument(
            f"group is a {type(group).__name__}: pass a ProcessGroup that this process is in"
        )
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return StoreRendezvous(store_of(group), rank, size, prefix="asyncdiff_core")


def store_of(group: Any) -> Any:
    """The store that a ProcessGroup was made over; its keys are the group's own."""
    import torch.distributed as dist

    try:
        return group.get_group_store()
    except (AttributeError, RuntimeError):  # torch before 2.6, or a backend without
        return dist.distributed_c10d._get_process_group_store(group)


def current_device() -> int:
    """The CUDA device that torch uses in this thread."""
    import torch

    return torch.cuda.current_device()
