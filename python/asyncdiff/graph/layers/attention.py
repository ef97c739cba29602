"""Attention by the kernels that the caller chose, as one operation of the exported graph.

Torch's attention becomes a node that takes whichever kernel is best when it runs: a choice of
kernels around it (``sdpa_kernel``, with which diffusers' ``_native_…`` backends choose) would be
lost. Other kernels (flash-attn, SageAttention, xFormers) are functions that the exporter cannot
look into. Either is recorded as an operation of ours, which makes the same call.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import register_flop_formula

#: What the kernels that torch may take are called, and how it is asked whether it may.
_KERNELS = {
    SDPBackend.CUDNN_ATTENTION: torch._C._get_cudnn_sdp_enabled,
    SDPBackend.FLASH_ATTENTION: torch._C._get_flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch._C._get_mem_efficient_sdp_enabled,
    SDPBackend.MATH: torch._C._get_math_sdp_enabled,
}
_EVERY = list(_KERNELS)
#: Diffusers' backends that are torch's, by how their names begin.
_NATIVE = ("native", "_native")
#: What calls of other backends are recorded with.
_TAKEN = {
    *("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
    *("return_lse", "_parallel_config"),
}


def chosen_kernels() -> list[SDPBackend]:
    """The kernels that torch may take for attention now."""
    return [kernel for kernel, enabled in _KERNELS.items() if enabled()]


def chosen() -> tuple[Any, ...]:
    """What is chosen for the attention of all denoisers of the process: the kernels that torch may
    take, and the backend of diffusers for processors that have none of their own."""
    registry = _registry()
    return (*chosen_kernels(), None if registry is None else str(registry._active_backend))


def _registry() -> Any:
    """Diffusers' table of backends, if diffusers is in use."""
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    return getattr(dispatch, "_AttentionBackendRegistry", None)


# ---- torch's kernels -----------------------------------------------------------------------------


def attend(*args: Any, **kwargs: Any) -> Tensor:
    """``scaled_dot_product_attention`` with its arguments, by the kernels that are chosen now, also
    where they are not any more when the recorded operation runs."""
    kernels = chosen_kernels()
    if kernels == _EVERY:
        return scaled_dot_product_attention(*args, **kwargs)
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return _of_torch(*_of(given), [int(kernel.value) for kernel in kernels])


def _of(given: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments that both of our operations begin with."""
    return (
        given["query"],
        given["key"],
        given["value"],
        given.get("attn_mask"),
        given.get("dropout_p", 0.0),
        given.get("is_causal", False),
        given.get("scale"),
        given.get("enable_gqa", False),
    )


@torch.library.custom_op("asyncdiff::attention", mutates_args=())
def _of_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    grouped: bool,
    kernels: list[int],
) -> Tensor:
    chosen = [kernel for kernel in _EVERY if int(kernel.value) in kernels]
    plain = dropout, causal
    if query.is_cuda or SDPBackend.FLASH_ATTENTION in chosen:
        # On GPUs one thread issues for all ranks; of the CPU's two this is the one that it takes.
        switches = sdpa_kernel(chosen) if query.is_cuda else contextlib.nullcontext()
        with switches:
            out = scaled_dot_product_attention(
                query, key, value, mask, *plain, scale=scale, enable_gqa=grouped
            )
    else:  # without the process's switches, which other ranks' threads see
        if mask is not None and mask.dtype is torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        out, _ = torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, mask, *plain, None, scale=scale, enable_gqa=grouped
        )
    return out.contiguous()


# ---- other kernels -------------------------------------------------------------------------------


@contextlib.contextmanager
def backends_recorded() -> Iterator[None]:
    """Open during an export: diffusers' backends that are not torch's become one operation each."""
    registry = _registry()
    if registry is None:
        yield
        return
    table = registry._backends
    before = dict(table)
    for name, call in before.items():
        text = str(getattr(name, "value", name))
        if not text.startswith(_NATIVE):
            table[name] = _recording(text, call)
    try:
        yield
    finally:
        table.update(before)


def _recording(name: str, call: Any) -> Any:
    def recorded(**kwargs: Any) -> Any:
        asked = kwargs.get("return_lse") or kwargs.get("_parallel_config") is not None
        if asked or not set(kwargs) <= _TAKEN:
            return call(**kwargs)
        return _of_others(*_of(kwargs), name)

    return recorded


@torch.library.custom_op("asyncdiff::attention_of", mutates_args=())
def _of_others(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    grouped: bool,
    backend: str,
) -> Tensor:
    registry = _registry()
    given = {
        **{"query": query, "key": key, "value": value, "attn_mask": mask, "dropout_p": dropout},
        **{"is_causal": causal, "scale": scale, "enable_gqa": grouped},
    }
    known = registry._supported_arg_names[backend]
    out = registry._backends[backend](**{k: x for k, x in given.items() if k in known})
    return out.clone(memory_format=torch.contiguous_format)


@_of_torch.register_fake
@_of_others.register_fake
def _result(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


@register_flop_formula(torch.ops.asyncdiff.attention)
def _flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    *outer, length, width = query
    return int(2 * torch.Size(outer).numel() * length * key[-2] * (width + value[-1]))


@register_flop_formula(torch.ops.asyncdiff.attention_of)
def _flops_of_others(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    batch, length, heads, width = query  # heads come last but one
    return int(2 * batch * heads * length * key[1] * (width + value[-1]))
