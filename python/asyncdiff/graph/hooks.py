"""What others hung on a denoiser that would go past asyncdiff, or that an export would drop, or
freeze as it then is."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from ..errors import InputError

#: Where diffusers has hooks that compute the same in every call: they are a part of what is
#: exported. Guiders put them on layers for one of the calls in a step.
_TRACED = ("layerwise_casting", "layer_skip", "smoothed_energy_guidance_utils")

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, partial)


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
            _check_attached(type(module).__name__, module)
            raise InputError(
                "the denoiser's forward was replaced (by offloading, DeepCache or another patch), "
                "which would go past asyncdiff: undo that first"
            )
        del module.forward


def check_hooks() -> None:
    """Raise InputError for a hook of all modules there are."""
    if torch_module._global_forward_pre_hooks or torch_module._global_forward_hooks:
        raise InputError(
            "there is a forward hook for all modules (register_module_forward_hook), which an "
            "exported denoiser would never call: remove it, handle.remove(), before the pipeline "
            "runs"
        )


def check_layers(module: nn.Module) -> None:
    """Raise InputError where layers do something besides their forward, which may change from call
    to call."""
    if getattr(module, "_parallel_config", None) is not None:
        _refuse(type(module).__name__, "parallel_config", module._parallel_config)
    # Of thousands of layers nearly always none has any.
    if not any(map(_suspicious, module.modules())):
        return
    for path, child in module.named_modules():
        layer = path or type(child).__name__
        _check_attached(layer, child)
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


def _suspicious(layer: nn.Module) -> bool:
    """Whether something may hang on a layer."""
    attributes = vars(layer)
    return bool(
        layer._forward_pre_hooks
        or layer._forward_hooks
        or attributes.get("_compiled_call_impl") is not None
        or "_hf_hook" in attributes
        or "_diffusers_hook" in attributes
    )


def _check_attached(layer: str, module: nn.Module) -> None:
    """Raise InputError for what accelerate or diffusers hung on a layer, unless it is the same in
    every call."""
    if "_hf_hook" in vars(module):
        raise InputError(
            "the denoiser is offloaded by accelerate: call pipe.remove_all_hooks() (of a modular "
            "pipeline its manager's disable_auto_cpu_offload()), move the pipeline to a device and "
            "parallelise it. pipe.enable_model_cpu_offload() after that offloads its other parts"
        )
    for name, hook in _hooks(vars(module)).items():
        if not type(hook).__module__.endswith(_TRACED):
            _refuse(layer, name, hook)


def _hooks(attributes: Mapping[str, Any]) -> dict[str, Any]:
    # An empty registry is left behind where hooks were, or might have been.
    return getattr(attributes.get("_diffusers_hook"), "hooks", None) or {}


def hooks_of(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The hooks of diffusers on a layer with these attributes: of each its class, and what it has
    besides the forward that it wraps."""
    return {
        name: {"class": type(hook), **{n: x for n, x in vars(hook).items() if n != "fn_ref"}}
        for name, hook in _hooks(attributes).items()
    }


def containers_of_hooks(attributes: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The dictionaries in which hooks of diffusers on a layer with these attributes, or what they
    have, may be exchanged."""
    hooks = getattr(attributes.get("_diffusers_hook"), "hooks", None)
    if isinstance(hooks, dict):
        yield hooks
        yield from map(vars, hooks.values())


def is_own(forward: Any) -> bool:
    """Whether what stands as a layer's attribute is the forward of its class, as diffusers leaves
    it where it has taken a hook away."""
    layer = getattr(forward, "__self__", None)
    return layer is not None and getattr(forward, "__func__", None) is type(layer).forward


def is_code(layer: nn.Module, name: str, value: Any) -> bool:
    """Whether a private attribute of a layer is something that its forward may call: a function,
    or what stands in the place of a method of its class. So convolutions are made to pad as tiles
    need it (``_conv_forward``)."""
    if name == "_compiled_call_impl":  # calls the forward
        return False
    return isinstance(value, _FUNCTIONS) or callable(getattr(type(layer), name, None))


def _refuse(layer: str, name: str, hook: object) -> None:
    """Raise InputError for a hook of diffusers that does something else from call to call."""
    where, source = f"{name} on {layer}", type(hook).__module__
    if "cache" in source or "broadcast" in source:
        raise InputError(
            f"the denoiser has a cache ({where}), which leaves out work in some calls, while "
            "asyncdiff spreads the work of all calls over devices: both at once do not go. Call "
            "disable_cache() on the denoiser first, or run the pipeline without asyncdiff"
        )
    if "offload" in source:
        raise InputError(
            f"the denoiser is offloaded in groups ({where}): each device holds its own part of it "
            "already. Load the pipeline without that, parallelise it, and then offload its other "
            "parts: pipe.enable_group_offload() leaves the denoiser as it is"
        )
    if "parallel" in source:
        raise InputError(
            f"the denoiser is spread over processes by diffusers ({where}): load it without "
            "enable_parallelism() and parallel_config, and let asyncdiff spread it"
        )
    raise InputError(
        f"layers of the denoiser have hooks of diffusers ({where}), which asyncdiff does not know: "
        "take them off first, or run the pipeline without asyncdiff"
    )
