"""The MODEL that the node returns: ComfyUI's patcher, with its weights in host memory, from where
ranks take their share, and with wrappers around its sampler and denoiser."""

from __future__ import annotations

import functools
from typing import Any

import torch

from asyncdiff.errors import InputError

from .host import host_of
from .settings import Settings
from .wrappers import add_wrappers

_HOST_MEMORY = torch.device("cpu")
#: What no model exceeds, in bytes: it is loaded completely.
_ALL = 1e32


class SpreadPatcher:
    """What a MODEL of the node does otherwise than ComfyUI's ``ModelPatcher``: loading means to put
    patched weights into host memory, unloading to free what ranks hold."""

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        """Another MODEL of the same model, which uses the same ranks."""
        other = super().clone(*args, **kwargs)  # type: ignore[misc]
        host_of(other.model).joined(other)
        return other

    def partially_load(
        self: Any, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Patch the weights, all of them and in host memory; bytes of ``device_to`` that it took:
        none. What is not the denoiser goes to the device."""
        model = self.model
        host_of(model).take_back()
        patched = model.current_weight_patches_uuid
        other = patched is not None and (patched != self.patches_uuid or force_patch_weights)
        if other or model.model_lowvram or model.device != _HOST_MEMORY:
            self.unpatch_model(_HOST_MEMORY)
        super().partially_load(_HOST_MEMORY, _ALL)  # type: ignore[misc]
        for name, child in model.named_children():
            if name != "diffusion_model":
                child.to(device_to)
        return 0

    def partially_unload(self, *args: Any, **kwargs: Any) -> int:
        """Bytes freed: none, so that ComfyUI goes on to unload all."""
        return 0

    def current_loaded_device(self: Any) -> Any:
        """Where ComfyUI takes the model to be, which therefore makes no room for it there."""
        return self.load_device

    def detach(self: Any, unpatch_all: bool = True) -> Any:
        """Unload: free what ranks hold. Not where another MODEL of the same model comes next."""
        host = host_of(self.model)
        if unpatch_all:
            host.take_back()
            host.close()
        model = super().detach(unpatch_all)  # type: ignore[misc]
        if not unpatch_all:
            host.lend()
        return model


@functools.cache
def _class_of(base: type) -> type:
    return type(f"Spread{base.__name__}", (SpreadPatcher, base), {"__module__": __name__})


def check_model(model: Any) -> None:
    """Raise InputError for what is no MODEL with a denoiser."""
    if not hasattr(getattr(model, "model", None), "diffusion_model"):
        raise InputError(
            f"AsyncDiff parallel: model is no MODEL of ComfyUI ({type(model).__name__}): connect "
            "what a loader returns"
        )


def spread_over(model: Any, settings: Settings) -> Any:
    """A clone of a MODEL that runs with these settings."""
    other = model.clone()
    if not isinstance(other, SpreadPatcher):
        other.__class__ = _class_of(type(other))
        host_of(other.model).joined(other)
    add_wrappers(other, settings)
    return other
