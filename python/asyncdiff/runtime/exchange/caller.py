"""Copies between a rank and its caller: inputs when they are ready, results as new tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from ..step import Caller


class CallerCopies:
    """Copies of one rank, whose work runs on ``stream`` of ``device`` (None on the CPU).

    Use it with the rank's device and stream current, but for :meth:`look`.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self._device, self._stream = device, stream
        self._outside: torch.cuda.Stream | None = None
        #: streams on callers' devices, for copies from there
        self._fetching: dict[torch.device, torch.cuda.Stream] = {}

    def look(self, caller: Caller) -> None:
        """Keep which stream of this device is the caller's, as long as it is the current one."""
        if caller.stream.device != self._device:
            self._outside = torch.cuda.current_stream(self._device)

    def fetch(self, mine: Sequence[tuple[torch.Tensor, torch.Tensor]], caller: Caller) -> None:
        """Copy what is ready when ``caller`` says so, and let the caller's stream wait for it."""
        assert self._stream is not None
        users = [caller.stream]
        context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        self._stream.wait_event(caller.ready)
        device = caller.stream.device
        if device != self._device:
            if any(value.device == self._device for _, value in mine):
                # What lies on this device, and not on the caller's, belongs to a stream of it.
                assert self._outside is not None
                users.append(self._outside)
                self._stream.wait_stream(self._outside)
            # Torch copies between devices on the source's current stream. That is the caller's,
            # which already waits for the results of ranks whose work was issued before: this rank
            # would then begin when they end. So it copies on a stream of its own there.
            if device not in self._fetching:
                self._fetching[device] = torch.cuda.Stream(device)
            self._fetching[device].wait_event(caller.ready)
            context = torch.cuda.stream(self._fetching[device])
        with context:
            for static, value in mine:
                static.copy_(value, non_blocking=True)
        for stream in users:
            stream.wait_stream(self._stream)

    def deliver(self, outputs: list[Any], caller: Caller | None) -> list[Any]:
        """The outputs as new tensors on the caller's device, ready in order of its stream."""
        if self._stream is None or caller is None:
            # These may lie in a mailbox, or in what the next run writes to.
            return [o.clone() if isinstance(o, torch.Tensor) else o for o in outputs]
        main = caller.stream
        with torch.cuda.stream(main):  # whose memory they are
            out = [
                torch.empty_like(o, device=main.device) if isinstance(o, torch.Tensor) else o
                for o in outputs
            ]
        # The memory of ``out`` may still be in use by earlier work of the main stream.
        self._stream.wait_stream(main)
        for new, old in zip(out, outputs, strict=True):
            if isinstance(old, torch.Tensor):
                new.copy_(old, non_blocking=True)
        main.wait_stream(self._stream)
        return out
