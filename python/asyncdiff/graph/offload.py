"""A module's weights on their way from a GPU to host memory, while ranks are made of them.

They go by way of pinned memory. A straight copy takes what one processor takes to make the pages of
new memory, and to copy to them: gigabytes a second. Here the GPU fills a pinned buffer while all
processors, as torch copies, empty another one into its place.

The thread that does this calls torch as rarely as it can. Torch lets go of the interpreter in each
call, for a view too, and has to wait up to 5 ms for it afterwards, beside a thread that exports;
there are thousands of weights. So what goes where is found out before that thread begins.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from .layers.quantized import own_classes, plain

#: Bytes of a buffer.
_STAGE = 64 << 20
_BUFFERS = 2


#: A tensor in host memory, and the one that is to be copied to it.
_Pair = tuple[torch.Tensor, torch.Tensor]


class Stage(NamedTuple):
    """What a buffer holds at a time: where bytes go to and where they are, flat uint8, on one
    device each."""

    targets: list[torch.Tensor]
    sources: list[torch.Tensor]
    sizes: list[int]

    def pieces(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The beginning of a buffer, cut like what it is to hold."""
        return list(buffer[: sum(self.sizes)].split(self.sizes))


class Offload:
    """Weights that lie in host memory from now on, for whoever asks them, and whose values a thread
    copies there. Until :meth:`finish` they are to be taken from :meth:`original`.

    So ranks take them where they are, not from the host, and copying passes while the denoiser is
    exported.
    """

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self._weights = list(weights)
        #: by address, where the weights lay, which keeps them there
        self._originals = {id(w): plain(w) for w in self._weights}
        hosts = [torch.empty_like(x, device="cpu") for x in self._originals.values()]
        self._failed: BaseException | None = None
        self._quiet = threading.RLock()  # who takes times may do so inside of it
        whole: list[_Pair] = []
        #: what is not just memory, and is copied by itself
        self._others: list[_Pair] = []
        for host, original in zip(hosts, self._originals.values(), strict=True):
            alike = dense(original) and host.stride() == original.stride()
            (whole if alike else self._others).append((host, original))
        self._stages = stages_of(whole)
        self._thread = threading.Thread(target=self._copy, daemon=True)
        for weight, host in zip(self._weights, hosts, strict=True):
            weight.data = host
        self._thread.start()

    def original(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The values of a weight, where they were; None for one that is not on its way."""
        return self._originals.get(id(weight))

    @property
    def nbytes(self) -> int:
        """Bytes that lie where the weights were, until :meth:`finish`."""
        return sum(x.nbytes for x in self._originals.values())

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Nothing is copied meanwhile, as where times are taken."""
        with self._quiet:
            yield

    def finish(self) -> None:
        """Wait until the weights have their values. Raises what copying them raised; they lie where
        they were then."""
        self._thread.join()
        if self._failed is not None:
            for weight in self._weights:
                weight.data = self._originals[id(weight)]
        for device in self._gpus():  # other GPUs may still copy from it
            torch.cuda.synchronize(device)
        for kept in (self._originals, self._stages, self._others):
            kept.clear()
        if self._failed is not None:
            raise self._failed

    def _copy(self) -> None:
        try:
            with torch.inference_mode(False), torch.no_grad(), self._stream():
                copy_to_host(self._stages, self.waiting)
                for host, original in self._others:
                    with self._quiet:
                        host.copy_(original)
        except BaseException as e:
            self._failed = e

    @contextlib.contextmanager
    def _stream(self) -> Iterator[None]:
        """A stream beside the others, behind what has written to the weights so far."""
        with contextlib.ExitStack() as streams:
            for device in self._gpus():
                torch.cuda.synchronize(device)
                streams.enter_context(torch.cuda.stream(torch.cuda.Stream(device)))
            yield

    def _gpus(self) -> set[torch.device]:
        return {x.device for x in self._originals.values() if x.device.type == "cuda"}


def has_room(module: nn.Module, device: torch.device) -> bool:
    """Whether a GPU has as much memory left as all weights of a module take, so that these may stay
    a little longer. False where a weight is of a class of its own, or was made in inference mode,
    which moves in its own way."""
    weights = weights_of(module)
    if device.type != "cuda" or own_classes(module) or any(w.is_inference() for w in weights):
        return False
    taken = sum(w.nbytes for w in weights)
    free, _ = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + reserved > taken


def weights_of(module: nn.Module) -> list[torch.Tensor]:
    """The parameters and buffers of a module, each once."""
    return list({id(w): w for w in [*module.parameters(), *module.buffers()]}.values())


def copy_to_host(
    stages: Sequence[Stage], turn: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    """Copy what the stages hold into its place in host memory, on the current stream of its device.
    All is done when it returns.

    ``turn`` is entered for a few milliseconds at a time; outside of it nothing is copied. Raises
    what allocating and copying raise.
    """
    buffers: list[torch.Tensor] = []
    most = max((sum(stage.sizes) for stage in stages), default=0)
    full: tuple[Stage, list[torch.Tensor], torch.cuda.Event | None] | None = None
    for number, stage in enumerate(stages):
        with turn():
            cuda = stage.sources[0].is_cuda
            if len(buffers) < _BUFFERS:
                buffers.append(_buffer(most, cuda))
            pieces = stage.pieces(buffers[number % _BUFFERS])
            torch._foreach_copy_(pieces, stage.sources, non_blocking=True)
            filled = None
            if cuda:
                filled = torch.cuda.current_stream(stage.sources[0].device).record_event()
            _empty(full)
            full = stage, pieces, filled
    with turn():
        _empty(full)


def _buffer(nbytes: int, pinned: bool) -> torch.Tensor:
    """Host memory; not pinned, which is slower, where no more may be."""
    try:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
    except RuntimeError:
        return torch.empty(nbytes, dtype=torch.uint8)


def _empty(full: tuple[Stage, list[torch.Tensor], torch.cuda.Event | None] | None) -> None:
    """Copy what a buffer is full of to where it goes, once it is there."""
    if full is None:
        return
    stage, pieces, filled = full
    if filled is not None:
        filled.synchronize()
    torch._foreach_copy_(stage.targets, pieces)


def stages_of(pairs: Iterable[_Pair], nbytes: int = _STAGE) -> list[Stage]:
    """All bytes of tensors that are :func:`dense`, and of one shape, strides and dtype in each
    pair, in stages of at most so many."""
    out: list[Stage] = []
    room = 0
    for host, original in pairs:
        target, source = _bytes_of(host), _bytes_of(original)
        begin = 0
        while begin < len(source):
            if room == 0 or out[-1].sources[0].device != source.device:
                out.append(Stage([], [], []))
                room = nbytes
            end = min(len(source), begin + room)
            out[-1].targets.append(target[begin:end])
            out[-1].sources.append(source[begin:end])
            out[-1].sizes.append(end - begin)
            room -= end - begin
            begin = end
    return out


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a dense tensor, of which a size of 1 may have any stride."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor is all of the memory from its first element to its last, as it lies there:
    no view of conjugate or negated values."""
    if tensor.is_conj() or tensor.is_neg():
        return False
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() > 0 and last + 1 == tensor.numel()
