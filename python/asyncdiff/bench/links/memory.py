"""A channel's mailbox as memory that can be compared."""

from __future__ import annotations

import numpy as np
import torch

import asyncdiff_core as core

from ..payload import Memory, Payload


def slots_of(
    channel: core.Channel, payload: Payload, receiver: int, device: torch.device
) -> list[Memory]:
    """All slots of a receiver, without copying."""
    out = []
    for slot in range(channel.slots):
        buffer = channel.slot(receiver, slot)
        if device.type == "cuda":
            raw = torch.as_tensor(buffer, device=device)
        else:
            raw = torch.from_numpy(np.asarray(buffer))
        out.append(Memory(raw, payload.layout))
    return out
