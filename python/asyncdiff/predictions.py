"""Noise predictions on their way from the ranks that make them to those that read latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import asyncdiff_core as core

from .bundle import layout_of, views
from .calls import Role
from .engine import Engine


class Predictions:
    """A mailbox for every prediction of a tick, on every rank that reads latents.

    Made once an engine: mailboxes stay until the fabric is closed. ``shape`` and ``dtype`` are the
    prediction's; it travels densely, in the order of its dimensions.
    """

    def __init__(self, engine: Engine, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._engine = engine
        inputs = engine.partition.captured.signature.inputs
        (latents,) = (i for i, x in enumerate(inputs) if x.role is Role.LATENTS)
        #: the ranks that read latents
        self.readers = tuple(w.rank for w in engine.workers if latents in w.static)
        layout = layout_of([torch.empty(tuple(shape), dtype=dtype)])
        self._nbytes = layout.specs[0].nbytes
        last = len(engine.partition.components) - 1
        self._mailbox: dict[tuple[int, int, int], torch.Tensor] = {}
        self._own: dict[int, torch.Tensor] = {}
        self._channels: dict[int, core.Channel] = {}
        for sender in range(last, len(engine.workers)):
            if sender in self.readers:
                # A rank does not send to itself: its prediction stays where it can be found.
                self._own[sender] = torch.zeros(
                    tuple(shape), dtype=dtype, device=engine.devices[sender]
                )
            others = [r for r in self.readers if r != sender]
            if not others:
                continue
            channel = engine.fabric.channel(
                sender, others, layout, slots=engine.slots, name=f"predictions of rank {sender}"
            )
            self._channels[sender] = channel
            for r in others:
                for slot in range(engine.slots):
                    (view,) = views(channel, layout, r, slot, engine.devices[r])
                    self._mailbox[r, sender, slot] = view

    def put(self, rank: int, value: torch.Tensor, slot: int) -> None:
        """Hand ``rank``'s prediction out, on its current stream."""
        value = value.contiguous()
        if rank in self._own:
            self._own[rank].copy_(value)
        if rank in self._channels:
            stream = self._engine.workers[rank].stream
            self._channels[rank].put([value], slot, stream)

    def get(self, rank: int, source: int, slot: int) -> torch.Tensor:
        """Wait for ``source``'s prediction; as :meth:`look`, valid until :meth:`release`."""
        if rank != source:
            self._channels[source].get(rank, slot, self._engine.workers[rank].stream)
        return self.look(rank, source, slot)

    def look(self, rank: int, source: int, slot: int) -> torch.Tensor:
        """Where ``source``'s prediction lies for ``rank``, whatever is in it now."""
        return self._own[rank] if rank == source else self._mailbox[rank, source, slot]

    def release(self, rank: int, source: int, slot: int) -> None:
        """Give the mailbox back, after what reads it was issued."""
        if rank != source:
            self._channels[source].release(rank, slot, self._engine.workers[rank].stream)

    def bytes_sent(self, rank: int) -> int:
        """What a prediction of ``rank`` costs: bytes to all other ranks that read latents."""
        return self._nbytes * sum(r != rank for r in self.readers)
