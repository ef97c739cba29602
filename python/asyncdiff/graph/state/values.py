"""Values of tensors as constants of a call: what is prepared for such a call is for these alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from ..signature import Call, Input, Role, is_input

#: What a constant begins with that is the values of a tensor.
_VALUES = "values of a tensor: "
#: Stands for values that are all 0.
_ZEROS = "zeros"
#: What the constant is called that names the inputs that are not all 0.
_SOME = "not all 0"


#: By name, tensors whose values are known, how often they had been written to, and these values.
KnownValues = dict[str, tuple[torch.Tensor, int, str]]


def by_values(call: Call, known: KnownValues) -> Call:
    """The same call with the values of conditioning that is no floating point numbers, of masks of
    tokens, also of those that are 0.0 and 1.0, of numbers, and of what is all 0 (an image that is
    not given), among its constants: what is prepared for it is for these values alone. The call
    itself, where there are none. On a GPU the host waits, unless they are ``known``."""
    marks = [leaf for leaf in call.leaves if is_input(leaf)]
    each = zip(call.signature.inputs, call.tensors, marks, strict=True)
    texts = [_constant_of(x, t, mark, known) for x, t, mark in each]
    if all(text is None for text in texts) and not any(map(_can_be_zero, call.signature.inputs)):
        return call
    kept = [i for i, text in enumerate(texts) if text is None]
    inputs = call.signature.inputs
    pairs = zip(inputs, texts, strict=True)
    found = tuple((x.name, text) for x, text in pairs if text is not None)
    some = tuple(inputs[i].name for i in kept if _can_be_zero(inputs[i]))
    signature = replace(
        call.signature,
        inputs=tuple(inputs[i] for i in kept),
        constants=(*call.signature.constants, *found, (_SOME, some)),
    )
    every = iter(texts)
    leaves = tuple(_or(next(every), x) if is_input(x) else x for x in call.leaves)
    tensors = tuple(call.tensors[i] for i in kept)
    return replace(call, signature=signature, tensors=tensors, leaves=leaves)


def not_zero(call: Call) -> tuple[str, ...]:
    """The inputs of a call by :func:`by_values` of which it is known that they are not all 0."""
    found: tuple[str, ...] = dict(call.signature.constants).get(_SOME, ())
    return found


def values_in(constant: Any, device: torch.device) -> Any:
    """A tensor on a device, for a constant that has its values; any other constant as it is."""
    if not isinstance(constant, str) or not constant.startswith(_VALUES):
        return constant
    dtype, shape, values = constant.removeprefix(_VALUES).split(" ")
    sizes, kind = [int(n) for n in shape.split("x") if n], getattr(torch, dtype)
    count = math.prod(sizes)
    content = bytearray.fromhex("" if values == _ZEROS else values)
    content.extend(bytes(max(count, 1) * kind.itemsize - len(content)))
    # Of memory, which no tracing takes for an operation; there is no such tensor without any.
    return torch.frombuffer(content, dtype=kind)[:count].reshape(sizes).to(device)


def _can_be_zero(x: Input) -> bool:
    """Whether an input that all 0 stand for something else in: an image that is not given."""
    return x.role is Role.CONDITIONING and x.dtype.is_floating_point


def _is_mask(tensor: torch.Tensor) -> bool:
    """Whether floating point numbers are a mask of each sample's tokens."""
    return tensor.dim() > 1 and bool(((tensor == 0) | (tensor == 1)).all())


def _or(constant: Any, leaf: Any) -> Any:
    return leaf if constant is None else constant


def _constant_of(x: Input, tensor: torch.Tensor, mark: Any, known: KnownValues) -> Any:
    """What stands for an input among the constants; None for what stays an input."""
    if x.role is not Role.CONDITIONING:
        return None
    if mark is float:
        return float(tensor)
    return _text_of(x.name, tensor, known) or None


def _text_of(name: str, tensor: torch.Tensor, known: KnownValues) -> str:
    """The values of a tensor as a constant; "" for floating point numbers that are no mask, and
    not all 0."""
    version = -1 if tensor.is_inference() else tensor._version
    if name in known and version >= 0:
        before, then, text = known[name]
        if before is tensor and then == version:
            return text
    plain = tensor.detach().cpu().contiguous()
    shape = "x".join(map(str, plain.shape))
    number = plain.is_floating_point()
    if number and not plain.any():
        values = _ZEROS
    elif number and not _is_mask(plain):
        values = ""
    else:
        values = plain.reshape(-1).view(torch.uint8).numpy().tobytes().hex()
    text = values and f"{_VALUES}{str(plain.dtype).removeprefix('torch.')} {shape} {values}"
    known[name] = tensor, version, text
    return text
