"""What others hung on a denoiser's layers that an export would drop, or freeze as it then is."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module

from ..errors import InputError

#: Where a module, and torch for all modules, keeps what runs before and after a forward.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_GLOBAL = ("_global_forward_pre_hooks", "_global_forward_hooks")


def check_hooks(module: nn.Module) -> None:
    """Raise InputError where layers do something besides their forward, which may change from call
    to call."""
    if any(getattr(torch_module, name, None) for name in _GLOBAL):
        raise InputError(
            "there is a forward hook for all modules (register_module_forward_hook), which an "
            "exported denoiser would never call: remove it, handle.remove(), before the pipeline "
            "runs"
        )
    for path, child in module.named_modules():
        attributes = vars(child)
        if "_hf_hook" in attributes:
            raise InputError(
                "the denoiser is offloaded by accelerate: call pipe.remove_all_hooks() and move "
                "the pipeline to a device first"
            )
        # An empty registry is left behind where hooks were, or might have been.
        hooks = getattr(attributes.get("_diffusers_hook"), "hooks", None)
        if hooks:
            raise InputError(
                f"layers of the denoiser have hooks of diffusers ({', '.join(hooks)}), for "
                "caching, offloading or casting: asyncdiff does not serve them. Undo that first "
                "(disable_cache()), or load the pipeline without it"
            )
        if any(getattr(child, name) for name in _HOOKS):
            raise InputError(
                f"layer {path or type(child).__name__} has a forward hook (register_forward_hook, "
                "or weight_norm of old), which an exported denoiser would call once and never "
                "again: remove it, or run the pipeline without asyncdiff"
            )
        if getattr(child, "_compiled_call_impl", None) is not None:
            raise InputError(
                f"layer {path or type(child).__name__} is compiled by itself (module.compile(), "
                "compile_repeated_blocks()): leave that to asyncdiff (compile=True)"
            )
