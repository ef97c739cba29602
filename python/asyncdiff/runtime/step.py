"""What the runs of one tick are given."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

#: A timestep: a number where the host knows it and all elements of the argument are alike, else
#: the argument; None for a denoiser that takes none.
Time = float | torch.Tensor | None
#: The timestep arguments that a tick needs, by index in the generation.
Times = Mapping[int, Time]
#: Of earlier steps the latents, and whatever else changes from step to step, in the order of the
#: signature, for runs that are behind.
Earlier = Mapping[int, Sequence[torch.Tensor]]


class Caller:
    """The stream on which a tick's inputs become ready, as it is when this is made.

    It has to wait for the copies of the inputs: until then nobody may write to them, or to their
    memory once it is free.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.current_stream(device)
        # One event for all ranks: a rank must not wait for what others do with the inputs.
        self.ready = self.stream.record_event()

    @contextlib.contextmanager
    def beside(self, streams: dict[torch.device, torch.cuda.Stream]) -> Iterator[None]:
        """Work of the caller's device that begins when this was made, and waits for nothing that
        its stream has to do since; that waits for this work. It runs on one of ``streams``, of
        each device one, which this adds to."""
        device = self.stream.device
        if device not in streams:
            # Kept: torch's free memory is a stream's own. On a new one it would ask CUDA for more,
            # which may wait for all that the device has to do.
            streams[device] = torch.cuda.Stream(device)
        stream = streams[device]
        stream.wait_event(self.ready)
        with torch.cuda.stream(stream):
            yield
        self.stream.wait_stream(stream)


@dataclass(frozen=True)
class Ready:
    """Since when the tensors of a call have been ready on the caller's stream, if not only now:
    what ``moves`` from step to step, and ``everything``."""

    moves: Caller | None = None
    everything: Caller | None = None


READY_NOW = Ready()


@dataclass(frozen=True)
class Inputs:
    """The inputs of a tick, the same for all ranks.

    ``tensors`` are the denoiser's arguments in the order of the signature. ``number`` tells ticks
    apart. ``fresh`` are the places of conditioning that the ranks do not hold yet; ``version`` says
    which rows of timesteps fit it. ``caller`` tells when the tensors are ready, and where results
    belong (None: they are ready, and all on the CPU).
    """

    number: int
    tensors: Sequence[torch.Tensor]
    times: Times
    earlier: Earlier
    fresh: Sequence[int]
    version: int
    caller: Caller | None
