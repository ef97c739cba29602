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
    """A way for bundles from one sender to one or more receivers, made by :meth:`Fabric.channel`.

    The n-th bundle (from zero) uses slot ``n % slots``. The sender calls :meth:`begin`,
    :meth:`push` for every tensor, :meth:`commit` (or :meth:`put`, which is all three); each
    receiver :meth:`get`, reads the slot, and :meth:`release`. Each end may be used by one thread at
    a time, in the process that runs its rank.

    On the host these calls block, at most for the fabric's deadline, and raise ExchangeTimeout,
    Aborted or SlotOrderError; one whose wait Ctrl-C ended can be repeated. On CUDA they only
    enqueue on the given stream, can be captured in CUDA graphs, and such errors are raised by
    :meth:`Fabric.check`. All of them raise InvalidArgument for slots, ranks or tensors that do not
    exist, or a rank of another process, and CoreError once the fabric is closed.

    A begin that fails, or comes out of turn, grants no slot: what is pushed behind it is not stored
    (in mode "copy", on CUDA, it is, but nothing that was read meanwhile passes a
    :meth:`Fabric.check`), and no receiver is told.
    """

    def __init__(self, native: _core.Channel, devices: Sequence[int] | None) -> None:
        self._native = native
        self._push_array = native.push_array
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
        """What messages and profilers call it: the name that it was given, or its ranks'."""
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
        """How many bundles fit into a receiver's mailbox."""
        return self._native.slots

    @property
    def mode(self) -> str:
        """How bundles move: "inline", "kernel" or "copy"; what "auto" became. See
        :meth:`Fabric.channel`."""
        return self._native.mode

    def slot(self, receiver: int, slot: int) -> Buffer:
        """The memory of a slot in a receiver's mailbox, ``layout.nbytes`` bytes, without copying:
        on the receiver's device, and good as long as somebody holds it. Its contents are good from
        a get until the release. On CUDA only in the process that runs the receiver."""
        return self._native.slot(receiver, slot)

    def begin(self, slot: int, stream: Stream = None) -> None:
        """Wait until every receiver has released what ``slot`` held before."""
        self._native.begin(slot, pointer_of(stream))

    def push(self, index: int, tensor: Any, slot: int, stream: Stream = None) -> None:
        """Copy a tensor like ``layout.specs[index]`` to all receivers, into a slot that has begun.

        ``tensor``: of any library with ``__cuda_array_interface__``, ``__array_interface__`` or
        ``__dlpack__``; a GPU's on CUDA, the CPU's on the host. It must stay as it is until the copy
        is done, in the order of ``stream``. Raises InvalidArgument if shape, element type, strides
        or kind of device differ from the layout's, and for a tensor without memory (sparse, fake),
        or one that torch conjugates or negates lazily.
        """
        address = pointer_of(stream)
        if index >= 0 and self._push_array(index, tensor, slot, address, self._on_gpu):
            return
        array = describe(tensor)
        self._check(index, array.dtype, array.shape, array.strides, array.device)
        self._native.push(index, array.pointer, slot, address)

    def push_pointer(self, index: int, pointer: int, slot: int, stream: Stream = None) -> None:
        """Like :meth:`push`, of memory that the caller answers for."""
        if index < 0:
            raise InvalidArgument(f"tensor {index}: tensors of a bundle are counted from 0")
        self._native.push(index, pointer, slot, pointer_of(stream))

    def commit(self, slot: int, stream: Stream = None) -> None:
        """Make the bundle visible to all receivers."""
        self._native.commit(slot, pointer_of(stream))

    def put(self, tensors: Sequence[Any], slot: int, stream: Stream = None) -> None:
        """Begin, push all tensors, commit; on CUDA in one launch, unless :attr:`mode` is "copy".

        ``tensors[i]`` is like ``layout.specs[i]``. Raises InvalidArgument as :meth:`push` does,
        before anything is sent.
        """
        known, address = self._put_stream
        if stream is not known:
            address = pointer_of(stream)
            self._put_stream = stream, address
        if not self._put_arrays(tensors, slot, address, self._on_gpu):
            arrays = self._looked_at(tensors)  # held until they are copied
            self._native.put([a.pointer for a in arrays], slot, address)

    def get(self, receiver: int, slot: int, stream: Stream = None) -> None:
        """Wait until the next bundle lies in ``slot`` of this receiver, a rank."""
        self._native.get(receiver, slot, pointer_of(stream))

    def wait_for(self, receiver: int, count: int) -> None:
        """Wait on the host until ``count`` bundles since the last :meth:`Fabric.reset` have arrived
        at a receiver, if they come from the GPU of another host; elsewhere return at once.

        A :meth:`get` of the last of them waits for nothing on the device then. Where nothing waits
        on a device, nothing that the driver does for one thread at a time, such as loading a
        kernel, can keep a bundle from being carried. Raises what :meth:`Fabric.check` does, and
        ExchangeTimeout at the deadline.
        """
        if count < 0:
            raise InvalidArgument(f"{count} bundles: a count is 0 or more")
        self._native.wait_for(receiver, count)

    def wait_free(self, count: int) -> None:
        """Wait on the host until receivers on other hosts' GPUs have released what lay where the
        ``count``-th bundle since the last :meth:`Fabric.reset` goes; elsewhere return at once.

        The :meth:`begin` of that bundle waits for none of them on the device then: see
        :meth:`wait_for`, which raises the same.
        """
        if count < 0:
            raise InvalidArgument(f"{count} bundles: a count is 0 or more")
        self._native.wait_free(count)

    def release(self, receiver: int, slot: int, stream: Stream = None) -> None:
        """Give the slot back: it may be overwritten from now on."""
        self._native.release(receiver, slot, pointer_of(stream))

    def close(self) -> None:
        """Give back what the channel has; it cannot be used any more, nor can its slots on a GPU.

        Nothing may be in flight: on CUDA, waits for the devices. Collective among the processes
        that run its ends, as making it was; nothing in others. A channel that is only dropped gives
        its memory back, too, on the host and between GPUs of one process, but not between GPUs of
        several. A second call does nothing. Raises as :meth:`Fabric.channel` does.
        """
        self._native.close()

    def _pointers(self, tensors: Sequence[Any]) -> tuple[list[int], Any]:
        """Addresses, and what to hold while they are used: the caller's sequence may change."""
        held = tuple(tensors)
        found = self._addresses(held, self._on_gpu)
        if found is not None:
            return found, held
        arrays = self._looked_at(held)
        return [a.pointer for a in arrays], arrays

    def _looked_at(self, tensors: Sequence[Any]) -> list[Array]:
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
