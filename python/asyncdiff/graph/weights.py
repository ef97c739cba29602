"""Weights by device: each tensor at most once on a device, for as long as a component uses it.

With a checkpoint the module holds none: a component's are read when they are needed, by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..progress import heartbeat
from .capture import Captured
from .checkpoint import Checkpoint
from .layers.quantized import move, own_classes, plain, settle_weights, stays_at_home
from .offload import Offload, has_room, weights_of
from .writes import Written


@dataclass(eq=False)
class Held:
    """A weight on a device: ``tensor`` has the values of ``weight``, or is it, where that lies
    there (``shared``)."""

    tensor: torch.Tensor
    weight: torch.Tensor
    shared: bool

    def like(self, weight: torch.Tensor) -> bool:
        """Whether it can have the values of another weight."""
        return (self.tensor.shape, self.tensor.dtype) == (weight.shape, weight.dtype)


class Weights:
    """Brings a denoiser's weights to the devices of its components.

    With a ``checkpoint``, from there: those that the module has are freed, until :meth:`restore`.
    Raises InputError where it does not hold the module's weights, or these are quantised in a way
    that cannot be served.
    """

    def __init__(self, module: nn.Module, checkpoint: Checkpoint | None = None) -> None:
        settle_weights(module)
        self.module = module
        self.checkpoint = checkpoint
        #: Where the module lay before its weights were spread.
        self.home = next((p.device for p in module.parameters()), torch.device("cpu"))
        #: by the weight's name in the structure of the denoiser, or the address of another one
        self._held: weakref.WeakValueDictionary[tuple[str | int, torch.device], Held] = (
            weakref.WeakValueDictionary()
        )
        #: Those of them that have the values which the denoiser's weights have now: who keeps ranks
        #: knows.
        self.current: Callable[[], Iterable[Held]] = tuple
        #: how often a weight has taken another one's place, of which there may be copies; in all
        #: processes of a group, whoever has these
        self.exchanges = 0
        self._placed: dict[str, weakref.ref[torch.Tensor]] = {}
        #: which of them are known to have the values of the denoiser's weights
        self._known: set[tuple[str | int, torch.device]] = set()
        self._gpus: set[torch.device] = set()
        self._offloaded = False
        #: to be offloaded while ranks are made, and on the way
        self._leaves = False
        self._leaving: Offload | None = None
        self._channels_last: list[torch.Tensor] = []
        self._freed: FreedModule | None = None
        if checkpoint is not None:
            for name, weight in own_classes(module).items():
                raise InputError(
                    f"{name} is quantised ({type(weight).__name__}), and a checkpoint's weights "
                    "are read as plain tensors: leave checkpoint out"
                )
            self._freed = FreedModule(module, checkpoint)

    def channels_last(self) -> None:
        """Lay the module's convolution kernels out with channels last, as tensor cores want them.

        All that a convolution makes of them lies in memory in that way, too.
        """
        for weight in [*self.module.parameters(), *self.module.buffers()]:
            if weight.dim() == 4 and weight.is_contiguous():
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
                self._channels_last.append(weight)

    def offload(self) -> None:
        """Move the module's own copy to host memory, so that a device holds its component only; not
        where it has to stay, see :func:`~.layers.quantized.stays_at_home`. Where its GPU has room
        for it meanwhile, it is moved while ranks are made: :meth:`start_offload`."""
        if stays_at_home(self.module):
            return
        if self.home.type == "cuda" and not self._offloaded and self._freed is None:
            self._leaves = has_room(self.module, self.home)
            if not self._leaves:
                self._move()

    def _move(self) -> None:
        self._offloaded = True  # a part of it, should the host have no memory for all
        move(self.module, torch.device("cpu"))

    @property
    def leaves(self) -> bool:
        """Whether the module is to be offloaded while ranks are made."""
        return self._leaves

    def nbytes_on(self, device: torch.device) -> int:
        """Bytes that the module itself has on a device, also where it is about to leave."""
        if self._leaving is not None and device == self.home:
            return self._leaving.nbytes
        return sum(w.nbytes for w in weights_of(self.module) if w.device == device)

    def start_offload(self) -> Offload | None:
        """Begin to move what is to be offloaded, so that ranks that are made now take it from where
        it was; None: there is nothing. Then call :meth:`end_offload`."""
        if self._leaves:
            self._leaves, self._offloaded = False, True
            here = [w for w in weights_of(self.module) if w.device == self.home]
            self._leaving = Offload(here)
        return self._leaving

    def end_offload(self) -> None:
        """Wait until that lies in host memory. Raises what copying it raised."""
        leaving, self._leaving = self._leaving, None
        if leaving is not None:
            leaving.finish()

    def restore(self) -> None:
        """Put the module back where it was, and as it was, also after :meth:`channels_last` or
        :meth:`offload` failed in the middle.

        With a checkpoint what was freed is read again. Where its device has no memory for it any
        more, that is raised, and the whole module stays in host memory; call it again once there
        is.
        """
        while self._channels_last:
            weight = self._channels_last[-1]
            weight.data = weight.data.contiguous()
            self._channels_last.pop()
        if self._freed is not None:
            self._freed.restore()
        if self._offloaded:
            try:
                move(self.module, self.home)
            except BaseException:
                move(self.module, torch.device("cpu"))
                raise
            self._offloaded = False

    def look(self, captured: Captured) -> None:
        """Find out which copies have the values that the denoiser's weights have now. Call before
        ranks of ``captured`` are made, or take its weights anew: others may have the same
        copies."""
        current = set(self.current())
        self._known = {key for key, held in self._held.items() if held in current}
        for name, place in captured.places.items():
            weight = captured.weights[name]
            if weight.dim():
                before = self._placed.get(place)
                self.exchanges += before is not None and before() is not weight
                self._placed[place] = weakref.ref(weight)

    def get(self, captured: Captured, name: str, device: torch.device) -> Held:
        """The weight of placeholder ``name`` on ``device``; shared where it lies there already.
        Only after :meth:`look`."""
        weight = captured.weights[name]
        # What stands for a number is each graph's own.
        key = captured.places.get(name, id(weight)) if weight.dim() else id(weight), device
        held = self._held.get(key)
        if held is None or not self._fits(held, weight, device):
            near = self._on_another(key, weight)
            tensor = self.bring(captured, name, device) if near is None else near.to(device)
            self._held[key] = held = Held(tensor, weight, self._shared(weight, device))
        elif self._written(held, weight, known=key in self._known):
            self._take(held, weight)
        self._known.add(key)
        if device.type == "cuda":
            self._gpus.add(device)
        return held

    def _on_another(
        self, key: tuple[str | int, torch.device], weight: torch.Tensor
    ) -> torch.Tensor | None:
        """The weight's copy on another GPU, for one more GPU: links between them are many times
        faster than the way from the host. None where there is none that is known to be the same."""
        if key[1].type != "cuda" or weight.device.type == "cuda":
            return None
        for other in self._gpus:
            held = self._held.get((key[0], other))
            if held is not None and held.weight is weight and (key[0], other) in self._known:
                return held.tensor if held.like(weight) else None
        return None

    def _take(self, held: Held, weight: torch.Tensor) -> None:
        """Write a weight into what may be the copy of another one."""
        original = self._original(weight)
        held.tensor.copy_(plain(weight) if original is None else original)
        held.weight = weight

    @staticmethod
    def _written(held: Held, weight: torch.Tensor, known: bool) -> bool:
        """Whether a copy is not, or may not be any more, what the weight is."""
        if held.shared or weight.device.type == "meta":  # what is in a checkpoint stays
            return False
        # It may have been written to since another engine took it.
        return not known or held.weight is not weight

    def _fits(self, held: Held, weight: torch.Tensor, device: torch.device) -> bool:
        """Whether what is there can be, or become, the copy of a weight."""
        if not held.like(weight) or held.shared != self._shared(weight, device):
            return False
        return not held.shared or _same_memory(held.tensor, weight)

    def bring(self, captured: Captured, name: str, device: torch.device) -> torch.Tensor:
        """The weight of placeholder ``name`` on ``device``, of which nothing is kept here. Raises
        InputError where it has no values."""
        heartbeat(f"reading weights: {name}")  # a disk may be slow
        weight = captured.weights[name]
        if weight.device.type == "meta":
            if self._freed is None:
                raise InputError(
                    f"{captured.names[name]} has no values (it is on the meta device): load the "
                    "denoiser's weights, or say which file has them (checkpoint)"
                )
            return self._freed.read(captured.names[name], weight).to(device)
        original = self._original(weight)
        if original is not None:  # where it was it stays
            return original.to(device)
        return plain(weight).to(device, copy=not self._shared(weight, device))

    def _original(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The values of a weight that is being offloaded."""
        return None if self._leaving is None else self._leaving.original(weight)

    def renew(
        self, captured: Captured, held: Mapping[str, Held], written: Written
    ) -> dict[str, Held] | None:
        """Write the weights that the denoiser has now into the copies of them that a rank has, by
        name, where they are other ones, or were ``written`` to. What is returned stands for what
        the rank shares, which lies elsewhere now; None where a rank has to be made anew, for
        weights of other shapes or dtypes. Call when no rank computes."""
        moved: dict[str, Held] = {}
        for name, mine in held.items():
            weight, device = captured.weights[name], mine.tensor.device
            if weight.device.type == "meta":  # what is in a checkpoint stays
                continue
            if not mine.like(weight):
                return None
            if mine.shared or self._shared(weight, device):
                if not (mine.shared and _same_memory(mine.tensor, weight)):
                    moved[name] = other = self.get(captured, name, device)
                    if other.tensor.stride() != mine.tensor.stride():
                        return None
            elif mine.weight is not weight or written is None or id(weight) in written:
                self._take(mine, weight)
        return moved

    @staticmethod
    def _shared(weight: torch.Tensor, device: torch.device) -> bool:
        return weight.device == device


def _same_memory(tensor: torch.Tensor, weight: torch.Tensor) -> bool:
    return tensor.data_ptr() == weight.data_ptr() and tensor.stride() == weight.stride()


class FreedModule:
    """A module whose weights are on the meta device, where they take no memory; values of what is
    in no checkpoint are kept. :meth:`restore` puts back what the module had."""

    def __init__(self, module: nn.Module, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        #: where each tensor stands, under which name, and whether the module had its values
        self._places: list[tuple[dict[str, Any], str, str, torch.device]] = []
        #: what is in no checkpoint, by name
        self._kept: dict[str, torch.Tensor] = {}
        #: by name the one in the checkpoint: of a weight that is shared, one of its names
        self._names = _names(module, checkpoint)
        meta: dict[int, torch.Tensor] = {}
        for prefix, layer in module.named_modules(remove_duplicate=False):
            for where in (layer._parameters, layer._buffers):
                for key, tensor in where.items():
                    if tensor is None:
                        continue
                    name = f"{prefix}.{key}" if prefix else key
                    if name not in self._names and tensor.device.type != "meta":
                        self._kept[name] = tensor
                    self._places.append((where, key, name, tensor.device))
                    if id(tensor) not in meta and tensor.device.type != "meta":
                        meta[id(tensor)] = _on_meta(tensor)
                    where[key] = meta.get(id(tensor), tensor)

    def read(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """The values of a weight by its name in the module."""
        kept = self._kept.get(name)
        if kept is not None:
            return kept.detach()
        return self._checkpoint.read(self._names[name], like)

    def restore(self) -> None:
        """Give the module the values again that it had; what was on the meta device stays there."""
        real: dict[int, torch.Tensor] = {}
        while self._places:
            where, key, name, device = self._places[-1]
            now = where[key]
            if device.type != "meta":
                if id(now) not in real:
                    real[id(now)] = self._real(now, name, device)
                where[key] = real[id(now)]
            self._places.pop()
        self._kept.clear()

    def _real(self, now: torch.Tensor, name: str, device: torch.device) -> torch.Tensor:
        if name in self._kept:
            return self._kept[name]
        value = self._checkpoint.read(self._names[name], now).to(device)
        return nn.Parameter(value, now.requires_grad) if isinstance(now, nn.Parameter) else value


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    other = torch.empty_like(tensor, device="meta")
    return nn.Parameter(other, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else other


def _names(module: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Of each weight that is in the checkpoint, under which name. Raises InputError for parameters
    that are not, or not with this shape, or whose values there are others."""
    every = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    known = {id(tensor): name for name, tensor in every if name in checkpoint}
    parameters = {id(p) for p in module.parameters()}
    out = {}
    for name, tensor in every:
        found = known.get(id(tensor))
        if found is not None:
            out[name] = found
            if checkpoint.shape(found) != tuple(tensor.shape):
                raise InputError(
                    f"checkpoint {checkpoint.path}: {found} is {checkpoint.shape(found)} there, "
                    f"{tuple(tensor.shape)} in the denoiser"
                )
        elif id(tensor) in parameters or tensor.device.type == "meta":
            raise InputError(f"checkpoint {checkpoint.path} has no {name}")
    for name, tensor in every:
        known_as = out.get(name)
        if known_as is None or tensor.device.type == "meta":
            continue
        if not checkpoint.begins_like(known_as, tensor):
            raise InputError(
                f"checkpoint {checkpoint.path}: {known_as} has other values there than in the "
                "denoiser (an adapter that was fused, other weights): save the denoiser as it is, "
                "and name that"
            )
    return out
