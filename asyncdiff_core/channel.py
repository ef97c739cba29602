"""A one-way channel between ranks: a ring of slots, a bundle of tensors in each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import _core
from ._core import Buffer, Layout
from .arrays import Array, describe
from .errors import InvalidArgument

#: A CUDA stream: its address, any object with ``cuda_stream`` (torch) or ``ptr`` (CuPy), or None
#: for the default stream. Ignored on the host.
Stream = Any


class Channel:
    """Made by :meth:`Fabric.channel`. One sender, one or more receivers, a fixed layout.

    The n-th bundle (from zero) uses slot ``n % slots``. The sender calls :meth:`begin`,
    :meth:`push` for every tensor, :meth:`commit`; each receiver :meth:`get`, reads the slot, and
    :meth:`release`. On the host these calls block, at most for the fabric's deadline, and raise
    ExchangeTimeout, Aborted or SlotOrderError; one whose wait Ctrl-C ended can be repeated. On CUDA
    they only enqueue on the given stream, can be captured in CUDA graphs, and such errors are
    raised by :meth:`Fabric.check`. Each end may be used by one thread at a time.
    """

    def __init__(self, native: _core.Channel, devices: Sequence[int] | None) -> None:
        self._native = native
        self._put_arrays = native.put_arrays
        self._addresses = native.addresses
        self._specs = native.layout.specs
        #: of the sender; None on the host
        self._device = None if devices is None else devices[native.sender]
        self._on_gpu = devices is not None
        #: the stream of the last put, and its address: asking a stream for it takes long
        self._put_stream: tuple[Stream, int] = (None, 0)

    @property
    def name(self) -> str:
        """For messages."""
        return self._native.name

    @property
    def sender(self) -> int:
        """The sending rank."""
        return self._native.sender

    @property
    def receivers(self) -> tuple[int, ...]:
        """The receiving ranks."""
        return self._native.receivers

    @property
    def layout(self) -> Layout:
        """How a bundle lies in a slot."""
        return self._native.layout

    @property
    def slots(self) -> int:
        """How many bundles fit."""
        return self._native.slots

    @property
    def mode(self) -> str:
        """How bundles move: "inline", "kernel" or "copy"; see :meth:`Fabric.channel`."""
        return self._native.mode

    def slot(self, receiver: int, slot: int) -> Buffer:
        """The bytes of a slot in a receiver's mailbox, without copying."""
        return self._native.slot(receiver, slot)

    def begin(self, slot: int, stream: Stream = None) -> None:
        """Wait until every receiver has released what ``slot`` held before."""
        self._native.begin(slot, pointer_of(stream))

    def push(self, index: int, tensor: Any, slot: int, stream: Stream = None) -> None:
        """Copy a tensor like ``layout.specs[index]`` to all receivers.

        Raises InvalidArgument if shape, element type, strides or device differ from the layout's.
        """
        array = describe(tensor)
        self._check(index, array.dtype, array.shape, array.strides, array.device)
        self._native.push(index, array.pointer, slot, pointer_of(stream))

    def push_pointer(self, index: int, pointer: int, slot: int, stream: Stream = None) -> None:
        """Like :meth:`push`, of memory that the caller answers for."""
        if index < 0:
            raise InvalidArgument(f"tensor {index}: tensors of a bundle are counted from 0")
        self._native.push(index, pointer, slot, pointer_of(stream))

    def commit(self, slot: int, stream: Stream = None) -> None:
        """Make the bundle visible to all receivers."""
        self._native.commit(slot, pointer_of(stream))

    def put(self, tensors: Sequence[Any], slot: int, stream: Stream = None) -> None:
        """Begin, push all tensors, commit; in the channel's :attr:`mode`.

        Raises InvalidArgument as :meth:`push` does.
        """
        known, address = self._put_stream
        if stream is not known:
            address = pointer_of(stream)
            self._put_stream = stream, address
        if not self._put_arrays(tensors, slot, address, self._on_gpu):
            arrays = self._looked_at(tensors)  # held until they are copied
            self._native.put([a.pointer for a in arrays], slot, address)

    def get(self, receiver: int, slot: int, stream: Stream = None) -> None:
        """Wait until the next bundle lies in ``slot`` of this receiver."""
        self._native.get(receiver, slot, pointer_of(stream))

    def release(self, receiver: int, slot: int, stream: Stream = None) -> None:
        """Give the slot back: it may be overwritten from now on."""
        self._native.release(receiver, slot, pointer_of(stream))

    def unpack(
        self, receiver: int, tensors: Sequence[Any], slot: int, stream: Stream = None
    ) -> None:
        """Get, copy the bundle to ``tensors``, release: one launch, up to 96 tensors.

        An inline bundle is then not copied to the mailbox first. All earlier bundles must have been
        released. Raises InvalidArgument for tensors unlike the layout's, or that are read-only.
        """
        pointers, _held = self._pointers(tensors, True)
        self._native.unpack(receiver, pointers, slot, pointer_of(stream))

    def _pointers(self, tensors: Sequence[Any], written: bool = False) -> tuple[list[int], Any]:
        """Addresses, and what to hold while they are used: the caller's sequence may change."""
        held = tuple(tensors)
        found = self._addresses(held, self._on_gpu)
        if found is not None:
            return found, held
        arrays = self._looked_at(held, written)
        return [a.pointer for a in arrays], arrays

    def _looked_at(self, tensors: Sequence[Any], written: bool = False) -> list[Array]:
        """For arrays of any library, and for saying what is wrong with one."""
        if len(tensors) != len(self._specs):
            raise InvalidArgument(
                f"{len(tensors)} tensors for channel '{self.name}', whose bundle has "
                f"{len(self._specs)}"
            )
        arrays = []
        for index, tensor in enumerate(tensors):
            a = describe(tensor)
            self._check(index, a.dtype, a.shape, a.strides, a.device)
            if written and not a.writable:
                raise InvalidArgument(
                    f"tensor {index} for channel '{self.name}' is read-only: give one that can be "
                    "written"
                )
            arrays.append(a)
        return arrays

    def _check(
        self,
        index: int,
        dtype: str,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        device: int | None,
    ) -> None:
        if not 0 <= index < len(self._specs):
            raise InvalidArgument(
                f"tensor {index}: the bundle of channel '{self.name}' has {len(self._specs)} "
                "tensors, from 0"
            )
        spec = self._specs[index]
        if dtype != spec.dtype or shape != spec.shape or not spec.same_strides(strides):
            raise InvalidArgument(
                f"tensor {index} of channel '{self.name}' is {dtype}{shape} with strides "
                f"{strides}, but {spec} was agreed"
            )
        # A GPU tensor may lie on any device that the sender's can read; on the host it cannot be
        # read at all, and host memory cannot be read by a captured graph at any later time.
        if (device is None) != (self._device is None):
            here = "the CPU" if device is None else "a GPU"
            there = "the CPU" if self._device is None else f"cuda:{self._device}"
            raise InvalidArgument(
                f"tensor {index} of channel '{self.name}' lies on {here}, but its sender, rank "
                f"{self.sender}, is on {there}"
            )


def pointer_of(stream: Stream) -> int:
    """The address of a stream; raises InvalidArgument for what is none."""
    if stream is None:
        return 0
    if isinstance(stream, int):
        return stream
    for name in ("cuda_stream", "ptr"):
        address = getattr(stream, name, None)
        if address is not None:
            return int(address)
    raise InvalidArgument(f"{type(stream).__name__} is no CUDA stream and no address of one")
