"""Weights by device: each tensor at most once on a device, for as long as a component uses it."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import nn

from .capture import Captured


class Weights:
    """Brings a denoiser's weights to the devices of its components."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        #: Where the module lay before its weights were spread.
        self.home = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._copies: weakref.WeakValueDictionary[tuple[int, torch.device], torch.Tensor] = (
            weakref.WeakValueDictionary()
        )
        #: which of them are of the denoiser captured last, and known to be its weights
        self._known: set[tuple[int, torch.device]] = set()
        self._captured: Callable[[], Captured | None] = lambda: None
        self._offloaded = False
        self._channels_last: list[torch.Tensor] = []

    def channels_last(self) -> None:
        """Lay the module's convolution kernels out with channels last, as tensor cores want them.

        All that a convolution makes of them lies in memory in that way, too.
        """
        for weight in [*self.module.parameters(), *self.module.buffers()]:
            if weight.dim() == 4 and weight.is_contiguous():
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
                self._channels_last.append(weight)

    def offload(self) -> None:
        """Move the module's own copy to host memory, so that a device holds its component only."""
        if self.home.type == "cuda" and not self._offloaded:
            self._offloaded = True  # a part of it, should the host have no memory for all
            nn.Module.to(self.module, "cpu")

    def restore(self) -> None:
        """Put the module back where it was, and as it was, also after :meth:`channels_last` or
        :meth:`offload` failed in the middle.

        Where its device has no memory for it any more, that is raised, and the whole module stays
        in host memory; call it again once there is.
        """
        while self._channels_last:
            weight = self._channels_last[-1]
            weight.data = weight.data.contiguous()
            self._channels_last.pop()
        if self._offloaded:
            try:
                nn.Module.to(self.module, self.home)
            except BaseException:
                nn.Module.to(self.module, "cpu")
                raise
            self._offloaded = False

    def get(self, captured: Captured, name: str, device: torch.device) -> torch.Tensor:
        """The weight of placeholder ``name`` on ``device``; shared where it lies there already."""
        weight = captured.weights[name]
        if captured is not self._captured():
            self._captured = weakref.ref(captured)
            self._known.clear()
        key = (id(weight), device)
        copy = self._copies.get(key)
        if copy is None or key not in self._known:
            # It may have been written to since another engine took it.
            if copy is None or not self._renewed(weight, copy):
                shared = self._shared(weight, device)
                self._copies[key] = copy = weight.detach().to(device, copy=not shared)
            self._known.add(key)
        return copy

    def renew(self, captured: Captured) -> bool:
        """Write what the weights are now into the copies of them; whether that was possible. Not
        where a weight that is shared lies elsewhere now, or has another shape or dtype. Call when
        no rank computes."""
        devices = {device for _, device in self._copies}
        renewed = [
            self._renewed(weight, copy)
            for weight in captured.weights.values()
            for device in devices
            if (copy := self._copies.get((id(weight), device))) is not None
        ]
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return all(renewed)

    def _renewed(self, weight: torch.Tensor, copy: torch.Tensor) -> bool:
        if (copy.shape, copy.dtype) != (weight.shape, weight.dtype):
            return False
        if self._shared(weight, copy.device):
            return copy.data_ptr() == weight.data_ptr()
        copy.copy_(weight.detach())
        return True

    @staticmethod
    def _shared(weight: torch.Tensor, device: torch.device) -> bool:
        return weight.device == device
