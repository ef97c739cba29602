"""What a receiver of a channel on the host has got."""

from __future__ import annotations

import numpy as np

import asyncdiff_core as core


def read(channel: core.Channel, receiver: int, slot: int) -> list[np.ndarray]:
    """Views of the tensors in a slot; flat, if their strides are not row-major."""
    raw = np.asarray(channel.slot(receiver, slot))
    parts = zip(channel.layout.specs, channel.layout.offsets, strict=True)
    return [raw[o : o + s.nbytes].view(s.dtype).reshape(s.shape) for s, o in parts]


def receive(channel: core.Channel, receiver: int, slot: int) -> list[np.ndarray]:
    """Get, copy the tensors out, release."""
    channel.get(receiver, slot)
    tensors = [t.copy() for t in read(channel, receiver, slot)]
    channel.release(receiver, slot)
    return tensors
