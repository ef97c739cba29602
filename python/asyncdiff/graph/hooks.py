"""What others hung on a denoiser that would go past asyncdiff, or that an export would drop, or
freeze as it then is."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module

from ..errors import InputError


def check_forward(module: nn.Module) -> None:
    """Raise InputError where calls of the denoiser would not come to the forward of its class. What
    diffusers leaves where it has taken a hook away is taken away, too."""
    if hasattr(module, "_orig_mod"):
        raise InputError(
            "the denoiser is wrapped by torch.compile: parallelise it before that, or better let "
            "asyncdiff compile its components (compile=True)"
        )
    forward = vars(module).get("forward")
    if forward is not None:
        own = getattr(forward, "__self__", None), getattr(forward, "__func__", None)
        if own != (module, type(module).forward):
            raise InputError(
                "the denoiser's forward was replaced (by offloading, DeepCache or another patch), "
                "which would go past asyncdiff: undo that first"
            )
        del module.forward


def check_hooks(module: nn.Module) -> None:
    """Raise InputError where layers do something besides their forward, which may change from call
    to call."""
    if torch_module._global_forward_pre_hooks or torch_module._global_forward_hooks:
        raise InputError(
            "there is a forward hook for all modules (register_module_forward_hook), which an "
            "exported denoiser would never call: remove it, handle.remove(), before the pipeline "
            "runs"
        )
    for path, child in module.named_modules():
        layer = path or type(child).__name__
        if "_hf_hook" in vars(child):
            raise InputError(
                "the denoiser is offloaded by accelerate: call pipe.remove_all_hooks() and move "
                "the pipeline to a device first"
            )
        # An empty registry is left behind where hooks were, or might have been.
        hooks = getattr(vars(child).get("_diffusers_hook"), "hooks", None)
        if hooks:
            raise InputError(
                f"layers of the denoiser have hooks of diffusers ({', '.join(hooks)}), for "
                "caching, offloading or casting: asyncdiff does not serve them. Undo that first "
                "(disable_cache()), or load the pipeline without it"
            )
        if child._forward_pre_hooks or child._forward_hooks:
            raise InputError(
                f"layer {layer} has a forward hook (register_forward_hook, "
                "or weight_norm of old), which an exported denoiser would call once and never "
                "again: remove it, or run the pipeline without asyncdiff"
            )
        if getattr(child, "_compiled_call_impl", None) is not None:
            raise InputError(
                f"layer {layer} is compiled by itself (module.compile(), "
                "compile_repeated_blocks()): leave that to asyncdiff (compile=True)"
            )
