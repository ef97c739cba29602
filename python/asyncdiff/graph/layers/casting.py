"""Layers that cast their weights for each call (diffusers' layerwise casting), as the exporter can
follow it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

#: Name of the hook that casts a layer's weights, in diffusers.
CASTING = "layerwise_casting"


@contextlib.contextmanager
def casts_traced(module: nn.Module) -> Iterator[None]:
    """Open during an export: layers that cast their weights write nothing into them, but compute
    with copies in the other dtype. A component so holds the weights as they are stored."""
    with contextlib.ExitStack() as undo:
        for layer in module.modules():
            registry = vars(layer).get("_diffusers_hook")
            hook = getattr(registry, "hooks", {}).get(CASTING)
            if hook is not None:
                _trace(hook, undo)
        yield


def _trace(hook: Any, undo: contextlib.ExitStack) -> None:
    calls, dtype = hook.fn_ref, hook.compute_dtype
    before, after = calls.pre_forward, calls.post_forward
    stored: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def cast(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        every: list[dict[str, Any]] = [
            w for x in layer.modules() for w in (x._parameters, x._buffers)
        ]
        for where in every:
            stored.append((where, dict(where)))
            for name, tensor in where.items():
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    where[name] = tensor.to(dtype)
        return args, kwargs

    def put_back(_: Any, output: Any) -> Any:
        while stored:
            where, tensors = stored.pop()
            where.update(tensors)
        return output

    calls.pre_forward, calls.post_forward = cast, put_back
    undo.callback(setattr, calls, "pre_forward", before)
    undo.callback(setattr, calls, "post_forward", after)
    undo.callback(put_back, None, None)
