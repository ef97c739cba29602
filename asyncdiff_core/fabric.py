"""Ranks, how they reach each other's memory, and how a failure of one stops the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import _core
from ._core import Layout
from .channel import Channel, Stream, pointer_of
from .errors import DeviceError, InvalidArgument
from .nccl import find_in_wheel
from .process_group import current_device, rendezvous_of
from .rendezvous import Rendezvous


class Fabric:
    """Ranks that exchange bundles through channels; a :class:`HostFabric` or a
    :class:`CudaFabric`."""

    def __init__(self, native: _core.Fabric, devices: Sequence[int] | None) -> None:
        self._native = native
        self._devices = None if devices is None else tuple(devices)

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return self._native.ranks

    @property
    def kind(self) -> str:
        """ "host" or "cuda"."""
        return self._native.kind

    @property
    def hosts(self) -> tuple[int, ...]:
        """The number of each rank's host, from 0."""
        return self._native.hosts

    @property
    def recovers(self) -> bool:
        """Whether :meth:`reset` helps after a failure; else close the fabric and make another."""
        return self._native.recovers

    @property
    def deadline(self) -> float:
        """Seconds that a wait may last."""
        return self._native.deadline

    def links(self) -> dict[tuple[int, int], str]:
        """How the first rank of a pair writes memory of the second.

        "memory" (the same memory), "peer" (device to device) or "staged" (pinned host memory); what
        connects two hosts, "sockets" or "nccl"; "simulated" where it is made to look like another
        link (:attr:`simulated_link`).
        """
        return self._native.links()

    @property
    def simulated_link(self) -> str | None:
        """The link that all pairs of ranks are made to have, such as "25GB/s,10us"; None where
        links are as they are."""
        return self._native.simulated_link or None

    def link_reasons(self) -> dict[tuple[int, int], str]:
        """Why links are staged, or what is simulated over which, by (sender, receiver); those that
        are neither are left out."""
        return self._native.link_reasons()

    def channel(
        self,
        sender: int,
        receivers: Sequence[int],
        layout: Layout,
        *,
        slots: int = 2,
        name: str = "",
        mode: str = "auto",
    ) -> Channel:
        """Make a channel, with mailbox memory of ``slots`` bundles (1 to 1024) for each receiver.

        ``mode`` says how bundles move between GPUs: "copy" (copy engines, tensor after tensor,
        which takes no multiprocessor), "kernel" (a launch stores a tensor, or in a put all of them,
        to all receivers; at most 320 tensors), "inline" (the same with data and flag in one store,
        for small bundles; takes twice the mailbox memory), or "auto" (the fastest by what puts cost
        on this machine, measured once: :func:`put_costs`). On the host all are the same.

        With several processes it is collective among those that run its ends: they make it with the
        same arguments, and any two processes make the calls that they share in the same order. In
        others it returns at once: a channel that they can look at, but not use.

        Raises InvalidArgument for ranks or modes that do not exist, on CUDA for more than 16
        receivers, and where processes ask for different channels; CudaError if memory is short;
        CoreError if the fabric is closed or has no room for more channels; ProcessLost and
        CollectiveTimeout where another process is gone or does not come.
        """
        native = self._native.channel(sender, list(receivers), layout, slots, name, mode)
        return Channel(native, self._devices)

    def put_batch(
        self, puts: Sequence[tuple[Channel, Sequence[Any], int]], stream: Stream = None
    ) -> None:
        """Put bundles of several channels of one sender: (channel, tensors, slot) for each.

        On CUDA they are one launch (as few as needed for more than 8 channels or 320 tensors),
        whatever the channels' modes: as when a rank broadcasts its noise prediction to all and
        sends its hidden states to one. Raises InvalidArgument for channels of different senders or
        fabrics, or one named twice. After a KeyboardInterrupt some may have been put:
        :meth:`reset`.
        """
        all_puts, held = [], []
        for channel, tensors, slot in puts:
            pointers, arrays = channel._pointers(tensors)
            all_puts.append((channel._native, pointers, slot))
            held.append(arrays)
        self._native.put_batch(all_puts, pointer_of(stream))

    def abort(self, rank: int, reason: str) -> None:
        """End all waits, now and later, until :meth:`reset`; the others get Aborted.

        ``rank`` and ``reason`` are for their message. Waits for nothing: any thread may call it at
        any time, also while another one makes a channel or resets. Nothing once closed.
        """
        self._native.abort(rank, reason)

    def check(self) -> None:
        """Raise the first failure since the last reset, if there was one.

        ExchangeTimeout, SlotOrderError, Aborted, ProcessLost or CollectiveTimeout; CoreError once
        the fabric is closed. Does not synchronize: what streams have still to do may still fail.
        """
        self._native.check()

    def reset(self, first_bundle: int = 0) -> None:
        """Empty all channels and forget failures. Nothing may be in flight.

        The next bundle of every channel counts as number ``first_bundle`` and uses slot
        ``first_bundle % slots``; channels made later start at zero. With several processes it is
        collective, and raises InvalidArgument where they name different numbers.
        """
        self._native.reset(first_bundle)

    def all_gather(self, mine: bytes, *, timeout: float | None = None) -> list[bytes]:
        """Everybody's bytes, by process, in some 10 microseconds; collective among all processes.

        For what they have to agree on, and to wait for each other: a process that ends is noticed
        at once, one that lives is waited for for ``timeout`` seconds (None: the deadline), which
        begin anew with each :meth:`heartbeat` of it. Raises
        ProcessLost and CollectiveTimeout (the fabric is over then, in all processes), and
        InvalidArgument where a process makes another call.
        """
        return self._native.all_gather(mine, timeout)

    def heartbeat(self, doing: str) -> None:
        """Tell the processes that wait for this one in a collective call that it goes on.

        They wait their time anew; their error, should it pass, ends with ``doing``, of which 96
        bytes are kept. Not collective; any thread may call it.
        """
        self._native.heartbeat(doing)

    def close(self) -> None:
        """End the fabric: nothing can be exchanged any more.

        Nothing may be in flight. Mailbox memory lives on while somebody holds it. A second call
        does nothing.
        """
        self._native.close()


class HostFabric(Fabric):
    """Threads of one process, or processes, of one host (sharing memory) or several (over
    TCP).

    ``deadline`` in seconds (None: ASYNCDIFF_DEADLINE, else 10). With a ``rendezvous``,
    ``owners[r]`` is the process that runs rank r (None: rank r is process r). Making the fabric,
    ``reset`` and ``all_gather`` are then collective among all processes, ``channel`` and
    ``Channel.close`` among those that run the channel's ends: with the same arguments, in an order
    that any two processes share, and none goes on if it fails in one. A process uses the ends of
    its own ranks only (InvalidArgument), and none of its parent's (CoreError).

    ``link`` simulates a link between any two ranks, for tests and benchmarks: "25GB/s,10us" for
    bandwidth and latency (GB/s, MB/s, kB/s, Gb/s, Mb/s; ns, us or µs, ms), with ",both" where both
    directions of a pair share it, and ",all" where all pairs do; "off" for none, None for what
    ASYNCDIFF_LINK says. A bundle is there when it would have arrived; who sends does not wait.

    Raises InvalidArgument for no ranks, a deadline that is not positive or longer than a day,
    owners that do not exist, another ``link``, one whose
    latency is not below the deadline, or one between several hosts, and where processes
    differ; ProcessLost and CollectiveTimeout as :meth:`all_gather` does.
    """

    def __init__(
        self,
        ranks: int,
        *,
        deadline: float | None = None,
        owners: Sequence[int] | None = None,
        rendezvous: Rendezvous | None = None,
        link: str | None = None,
    ) -> None:
        processes = _owners(ranks, owners, rendezvous)
        if rendezvous is None:
            native: _core.Fabric = _core.HostFabric(ranks, deadline, link)
        else:
            native = _core.make_host_fabric(processes, deadline, rendezvous, link)
        super().__init__(native, None)

    @classmethod
    def from_group(cls, group: Any = None, *, deadline: float | None = None) -> HostFabric:
        """Rank r is process r of a ``torch.distributed`` group (None: of all processes), whose
        store is the rendezvous. Collective in the group. Raises InvalidArgument where this process
        is in no such group, and as making a fabric does."""
        rendezvous = rendezvous_of(group)
        return cls(rendezvous.processes, deadline=deadline, rendezvous=rendezvous)


class CudaFabric(Fabric):
    """GPUs: ``devices[r]`` is the CUDA device index of rank r, and may repeat.

    ``transport`` is "auto" (peer access where a write and a read-back prove it, else pinned host
    memory), "peer" (raises DeviceError where that does not work) or "staged"; None takes
    ASYNCDIFF_TRANSPORT, else "auto". Raises DeviceError for devices that do not exist.

    ``link`` simulates a link, as with :class:`HostFabric`, whatever the transport: the stream that
    sends a bundle waits, on the device, until it would have arrived. Those who share a link have
    even shares of it while they send at the same time, and no channel is "inline".

    With a ``rendezvous``, ranks run in several processes, as with :class:`HostFabric`;
    ``devices[r]`` is the index in rank r's own process, and :meth:`close` is collective too. Device
    memory is shared by CUDA IPC, so nothing that others may have mapped is given back before
    the channel, or the fabric, is closed.
    """

    def __init__(
        self,
        devices: Sequence[int],
        *,
        deadline: float | None = None,
        transport: str | None = None,
        owners: Sequence[int] | None = None,
        rendezvous: Rendezvous | None = None,
        link: str | None = None,
    ) -> None:
        if not _core.cuda_built():
            raise DeviceError(
                "asyncdiff_core was built without CUDA: install nvcc and reinstall with "
                "ASYNCDIFF_CUDA=on"
            )
        processes = _owners(len(devices), owners, rendezvous)
        if rendezvous is None:
            native: _core.Fabric = _core.CudaFabric(list(devices), deadline, transport, link)
        else:
            find_in_wheel()
            native = _core.make_cuda_fabric(
                list(devices), processes, deadline, transport, rendezvous, link
            )
        super().__init__(native, devices)

    @classmethod
    def from_group(
        cls,
        group: Any = None,
        *,
        device: int | None = None,
        deadline: float | None = None,
        transport: str | None = None,
    ) -> CudaFabric:
        """Rank r is process r of a ``torch.distributed`` group (None: of all processes), whose
        store is the rendezvous, on its CUDA device ``device`` (None: torch's current one).
        Collective in the group. Raises InvalidArgument where this process is in no such group, and
        as making a fabric does."""
        rendezvous = rendezvous_of(group)
        mine = current_device() if device is None else device
        said = rendezvous.all_gather(str(mine).encode())
        try:
            devices = [int(one) for one in said]
        except ValueError:
            raise InvalidArgument(f"processes name no devices: {said}") from None
        return cls(devices, deadline=deadline, transport=transport, rendezvous=rendezvous)


def simulated_link() -> str | None:
    """The link that fabrics simulate where they are not told: what ASYNCDIFF_LINK says, None where
    it says nothing. Raises InvalidArgument for what is no link."""
    return _core.link_of_environment() or None


def transport() -> str:
    """How bundles travel between GPUs where fabrics are not told: what ASYNCDIFF_TRANSPORT says,
    else "auto"."""
    return _core.transport_of_environment()


def _owners(ranks: int, owners: Sequence[int] | None, rendezvous: Rendezvous | None) -> list[int]:
    if owners is None:
        return list(range(ranks))
    if rendezvous is None:
        raise InvalidArgument("owners without a rendezvous: who are the other processes?")
    if len(owners) != ranks:
        raise InvalidArgument(f"owners has {len(owners)} entries for {ranks} ranks")
    return list(owners)
