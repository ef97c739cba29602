"""Channels of asyncdiff_core as operators of torch, for code that ``torch.compile`` compiles.

    asyncdiff.ops.register("hidden states", channel)

    @torch.compile(fullgraph=True)
    def stage(x):
        asyncdiff.ops.put("hidden states", [block(x)], slot=0)
        (noise,) = asyncdiff.ops.get("noise", receiver=0, slot=0)
        asyncdiff.ops.release("noise", receiver=0, slot=0)
        return noise

The operators (``torch.ops.asyncdiff.put``, ``empty`` and ``get``, ``release``) work on the CPU,
where they block as channels of a HostFabric do, and on GPUs, where they enqueue on torch's current
stream, and ``fabric.check()`` raises what goes wrong on a device. They stay in the order in which
they are written, also those of different channels: each is declared to change one tensor,
:data:`ORDER`. Nothing goes back through them: no gradients.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch

import asyncdiff_core as core

from .errors import InputError
from .runtime.exchange.buffers import as_laid_out, memory_of, tensors_in

#: What every operator is declared to change, and none does: so that no compiler changes their
#: order, or leaves one out.
ORDER = torch.zeros(1)


@dataclass
class _Registered:
    channel: core.Channel
    #: the tensors of a mailbox by receiver and slot
    views: dict[tuple[int, int], list[torch.Tensor]] = field(default_factory=dict)


_channels: dict[str, _Registered] = {}
_lock = threading.Lock()


def register(name: str, channel: core.Channel) -> None:
    """Give a channel the name by which operators of this process find it.

    Compiled code knows names, not channels: another channel of the same layout may take the name
    later, after :func:`unregister`, without compiling again. Raises InputError for a name that is
    taken.
    """
    with _lock:
        if name in _channels:
            raise InputError(
                f"there is a channel {name!r} already: unregister it first, or take another name"
            )
        _channels[name] = _Registered(channel)


def unregister(name: str) -> None:
    """Forget a channel, which is neither closed nor changed. Raises InputError for a name that no
    channel has."""
    _found(name)
    with _lock:
        _channels.pop(name, None)


def put(channel: str, tensors: list[torch.Tensor], slot: int) -> None:
    """Put a bundle: wait until ``slot`` is free, copy, and tell the receivers.

    ``tensors[i]`` has the shape and dtype of the channel's ``layout.specs[i]``; one with other
    strides is copied first. Raises InputError for a name that no channel has, and what
    :meth:`asyncdiff_core.Channel.put` raises.
    """
    torch.ops.asyncdiff.put(ORDER, tensors, channel, slot)


def get(channel: str, receiver: int, slot: int) -> list[torch.Tensor]:
    """Wait for the next bundle of a receiver (a rank) in ``slot``, and return copies of its
    tensors.

    The slot is not given back: :func:`release` does that. Raises as :func:`put` does.
    """
    out: list[torch.Tensor] = torch.ops.asyncdiff.empty(channel, receiver)
    torch.ops.asyncdiff.get(ORDER, out, channel, receiver, slot)
    return out


def release(channel: str, receiver: int, slot: int) -> None:
    """Give a receiver's slot back to the sender. Raises as :func:`put` does."""
    torch.ops.asyncdiff.release(ORDER, channel, receiver, slot)


def _found(name: str) -> _Registered:
    try:
        return _channels[name]
    except KeyError:
        known = ", ".join(map(repr, _channels)) or "none"
        raise InputError(
            f"no channel is called {name!r} in this process (there are: {known}): "
            "asyncdiff.ops.register(name, channel) gives one a name"
        ) from None


def _stream(device: torch.device) -> int | None:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def _device(registered: _Registered, receiver: int) -> torch.device:
    device = registered.channel.slot(receiver, 0).device
    return torch.device("cpu") if device is None else torch.device("cuda", device)


def _like_bundle(channel: str, receiver: int) -> list[torch.Tensor]:
    registered = _found(channel)
    device = _device(registered, receiver)
    return [
        torch.empty_strided(s.shape, s.strides, dtype=getattr(torch, s.dtype), device=device)
        for s in registered.channel.layout.specs
    ]


# Strings and numbers are constants of what is compiled; slots may be symbols.
@torch.library.custom_op("asyncdiff::put", mutates_args=("order",))
def _put(order: torch.Tensor, tensors: list[torch.Tensor], channel: str, slot: int) -> None:
    found = _found(channel).channel
    specs = found.layout.specs
    if len(tensors) == len(specs):  # else the channel says what is wrong
        alike = [tuple(t.shape) == s.shape for t, s in zip(tensors, specs, strict=True)]
        tensors = [
            as_laid_out(t, s) if same else t
            for t, s, same in zip(tensors, specs, alike, strict=True)
        ]
    device = tensors[0].device if tensors else torch.device("cpu")
    found.put(tensors, slot, _stream(device))


@_put.register_fake
def _(order: torch.Tensor, tensors: list[torch.Tensor], channel: str, slot: int) -> None:
    _found(channel)


# What is received is written into tensors of its own operator: one that changes something cannot
# return a list of tensors.
@torch.library.custom_op("asyncdiff::empty", mutates_args=())
def _empty(channel: str, receiver: int) -> list[torch.Tensor]:
    return _like_bundle(channel, receiver)


@_empty.register_fake
def _(channel: str, receiver: int) -> list[torch.Tensor]:
    return _like_bundle(channel, receiver)


@torch.library.custom_op("asyncdiff::get", mutates_args=("order", "out"))
def _get(
    order: torch.Tensor, out: list[torch.Tensor], channel: str, receiver: int, slot: int
) -> None:
    registered = _found(channel)
    device = _device(registered, receiver)
    if (receiver, slot) not in registered.views:
        memory = memory_of(registered.channel.slot(receiver, slot), device)
        registered.views[receiver, slot] = tensors_in(memory, registered.channel.layout)
    registered.channel.get(receiver, slot, _stream(device))
    for mine, view in zip(out, registered.views[receiver, slot], strict=True):
        mine.copy_(view)


@_get.register_fake
def _(order: torch.Tensor, out: list[torch.Tensor], channel: str, receiver: int, slot: int) -> None:
    _found(channel)


@torch.library.custom_op("asyncdiff::release", mutates_args=("order",))
def _release(order: torch.Tensor, channel: str, receiver: int, slot: int) -> None:
    registered = _found(channel)
    registered.channel.release(receiver, slot, _stream(_device(registered, receiver)))


@_release.register_fake
def _(order: torch.Tensor, channel: str, receiver: int, slot: int) -> None:
    _found(channel)
