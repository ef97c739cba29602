"""Weights by device: each tensor at most once on a device, for as long as a component uses it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from .capture import Captured
from .conditioning import version_of


class Weights:
    """Brings a denoiser's weights to the devices of its components."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        #: Where the module lay before its weights were spread.
        self.home = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._copies: weakref.WeakValueDictionary[tuple[Any, ...], torch.Tensor] = (
            weakref.WeakValueDictionary()
        )
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
            nn.Module.to(self.module, "cpu")
            self._offloaded = True

    def restore(self) -> None:
        """Put the module back where it was, and as it was."""
        for weight in self._channels_last:
            weight.data = weight.data.contiguous()
        self._channels_last.clear()
        if self._offloaded:
            nn.Module.to(self.module, self.home)
            self._offloaded = False

    def get(self, captured: Captured, name: str, device: torch.device) -> torch.Tensor:
        """The weight of placeholder ``name`` on ``device``; shared where it lies there already."""
        weight = captured.weights[name]
        # An adapter that is merged into a weight gives it other memory, or writes to it.
        key = (id(weight), weight.data_ptr(), version_of(weight), device)
        copy = self._copies.get(key)
        if copy is None:
            copy = weight.detach().to(device)
            self._copies[key] = copy
        return copy
