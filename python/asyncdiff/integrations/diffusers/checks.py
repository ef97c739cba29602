"""What others may have done to a denoiser so that calls of it would go past asyncdiff."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...errors import InputError


def check_forward(module: nn.Module) -> None:
    """Raise InputError where calls of the denoiser would not come to the forward of its class. What
    diffusers leaves where it has taken a hook away is taken away, too."""
    if hasattr(module, "_orig_mod"):
        raise InputError(
            "the denoiser is wrapped by torch.compile: parallelise it before that, or better let "
            "asyncdiff compile its components (compile=True)"
        )
    forward = vars(module).get("forward")
    if forward is None:
        return
    if _is_own(module, forward):
        del module.forward
        return
    raise InputError(
        "the denoiser's forward was replaced (by offloading, DeepCache or another patch), which "
        "would go past asyncdiff: undo that first"
    )


def _is_own(module: nn.Module, forward: Any) -> bool:
    return (
        getattr(forward, "__self__", None) is module
        and getattr(forward, "__func__", None) is type(module).forward
    )
