"""What PEFT's adapters make of the layers that they wrap: which of these compute, and with which.

Adapters have names, and several of them wait in a layer of which one is active. What is computed
does not depend on that: an adapter that is switched off, or fused, leaves the layer that it wraps,
and of two of one rank either makes the same graph, of other weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

#: Attributes of a layer with adapters that tell what was asked for, or how weights were made, and
#: that its forward does not compute with while adapters are active.
_UNUSED = frozenset(
    (
        *("r", "lora_alpha", "use_rslora", "kwargs", "in_features", "out_features", "training"),
        *("frozen_peft_weight_names", "merged_adapters", "_active_adapter", "_disable_adapters"),
    )
)
#: The same of a denoiser that adapters can be loaded into.
_OF_DENOISER = frozenset(("peft_config", "_hf_peft_config_loaded", "lora_scale", "_safe_fusing"))
#: Of a layer with adapters, the dictionary of the numbers that their results are scaled by.
SCALES = "scaling"


def computing(layer: nn.Module) -> nn.Module:
    """The layer that computes in the place of ``layer``: what adapters wrap, where none of them is
    active by itself; else ``layer``."""
    while _has_adapters(layer) and (_switched_off(layer) or not active(layer)):
        layer = layer.get_submodule("base_layer")
    return layer


def active(layer: nn.Module) -> tuple[str, ...]:
    """The adapters that a layer computes with, in order; none of a layer without."""
    if not _has_adapters(layer):
        return ()
    names = vars(layer).get("_active_adapter") or ()
    each = (names,) if isinstance(names, str) else tuple(names)
    there = {key for kind in _kinds(layer) for key in getattr(layer, kind)}
    return tuple(name for name in each if name in there)


def unused(layer: nn.Module, name: str) -> bool:
    """Whether nothing is computed with an attribute of a layer, because of what adapters make of
    it."""
    if hasattr(type(layer), "fuse_lora"):
        return name in _OF_DENOISER
    return name in _UNUSED and _has_adapters(layer)


def by_adapter(layer: nn.Module, name: str) -> bool:
    """Whether an attribute of a layer with adapters has an entry for each of them."""
    return name in (*_kinds(layer), *getattr(layer, "other_param_names", ()))


def entries(mapping: Mapping[str, Any], adapters: Collection[str] | None) -> Iterator[Any]:
    """What is in a dictionary, as (key, name, value): the name is the key; with ``adapters`` the
    place of the adapter among these, which are all that count."""
    if adapters is None:
        yield from ((key, str(key), value) for key, value in mapping.items())
    else:
        for place, key in enumerate(adapters):
            if key in mapping:
                yield key, str(place), mapping[key]


def take_out(module: nn.Module) -> None:
    """Take adapters out of the weights that they were fused into, where they have been switched off
    since: their layers do so themselves in their next call, which a captured denoiser has not."""
    for layer in module.modules():
        state = vars(layer)
        if _has_adapters(layer) and state.get("_disable_adapters") and layer.merged_adapters:
            layer.unmerge()  # type: ignore[operator]


def _kinds(layer: nn.Module) -> tuple[str, ...]:
    return tuple(getattr(layer, "adapter_layer_names", ()))


def _has_adapters(layer: nn.Module) -> bool:
    """Whether it is a layer with LoRA adapters."""
    return "lora_A" in _kinds(layer) and "base_layer" in layer._modules


def _switched_off(layer: nn.Module) -> bool:
    state = vars(layer)
    return bool(state.get("_disable_adapters") or state.get("merged_adapters"))
