"""Operations that the exporter does not trace, or could not go on after, replaced by others."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from ...progress import heartbeat
from ..layers.attention import attend
from ..layers.quantized import is_wrapper

#: So many operations, and looks at a tensor, take less than a second.
_EVERY = 1000
_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


class Traced(TorchFunctionMode):
    """Operations in the place of some that the exporter does not trace: it does not see
    ``tensor.data``, and takes what is made of it for a constant; and it cannot take apart what is
    written through the strides of a view, as ``fill_diagonal_`` does. Attention is by
    the kernels that are chosen now. A tensor made of a symbol is one whose value is not known.
    ``ahead``: what is made of tensors alone that have values is
    computed at once, so that sizes may depend on it, and so is whether a tensor is all 0, of those
    that :meth:`not_zero` was told of."""

    def __init__(self, *, ahead: bool) -> None:
        super().__init__()
        self._ahead = ahead
        self._seen = 0
        #: in a linear layer of a weight that is a wrapper
        self._within = False
        #: tensors that are not all 0, and what compares each of them with 0
        self._some: list[torch.Tensor] = []
        self._compared: list[tuple[str, torch.Tensor]] = []

    def not_zero(self, tensor: torch.Tensor) -> None:
        """Not all values of ``tensor`` are 0."""
        self._some.append(tensor)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self._seen += 1
        if self._seen % _EVERY == 0:
            heartbeat(f"exporting the denoiser: {self._seen} operations")
        if function == _DATA:
            return args[0].detach()
        if function is scaled_dot_product_attention:
            return attend(*args, **kwargs)
        if function is torch.Tensor.fill_diagonal_ and args[0].dim() == 2 and len(args) == 2:
            args[0].diagonal().fill_(args[1])
            return args[0]
        if function is linear and len(args) > 1 and is_wrapper(args[1]) and not self._within:
            return self._linear(types, args, kwargs)
        # So asks optimum-quanto of an input that is traced, for it is no plain torch.Tensor.
        if self._within and function is torch.Tensor.dequantize and not args[0].is_quantized:
            return args[0]
        if function in (torch.as_tensor, torch.tensor) and isinstance(args[0], torch.SymInt):
            return torch.scalar_tensor(*args, **{"dtype": torch.int64, **kwargs})
        return self._at_once(function, args, kwargs) if self._ahead else function(*args, **kwargs)

    def _linear(self, types: Any, args: Any, kwargs: Any) -> Any:
        """What a wrapper makes of a linear layer, seen here, too: by itself torch looks away while
        a mode calls functions."""
        self._within = True
        try:
            with self:
                return type(args[1]).__torch_function__(linear, types, args, kwargs)
        finally:
            self._within = False

    def _at_once(self, function: Any, args: Any, kwargs: Any) -> Any:
        """What ``function`` returns, with values where they are known."""
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if _makes_mask(function, args, kwargs) or (
            tensors and all(type(t) is torch.Tensor for t in tensors)
        ):
            with _disable_current_modes():
                return function(*args, **kwargs)
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = (args[0], _by_places(args[1]), *args[2:])
        name = str(getattr(function, "__name__", "")).strip("_")
        answer = self._of_zeros(name, args) if not kwargs else None
        if answer is not None:
            with _disable_current_modes():
                return torch.tensor(answer)
        result = function(*args, **kwargs)
        if name in ("eq", "ne") and _among(args[0], self._some) and _is_zero(args[1]):
            self._compared.append((name, result))
        return result

    def _of_zeros(self, name: str, args: Any) -> bool | None:
        """Whether a tensor is all 0 (``all`` of what is equal to 0), or not; None: something else
        is asked, or of another one."""
        if len(args) != 1:
            return None
        if name == "any" and _among(args[0], [*self._some, *self._which("ne")]):
            return True
        return False if name == "all" and _among(args[0], self._which("eq")) else None

    def _which(self, comparison: str) -> list[torch.Tensor]:
        return [x for name, x in self._compared if name == comparison]


def _among(tensor: Any, known: list[torch.Tensor]) -> bool:
    return any(tensor is x for x in known)


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 0


def _makes_mask(function: Any, args: Any, kwargs: Any) -> bool:
    """Whether a tensor is made that may be a mask, or places: whole numbers, or 0 and 1 for each
    token of a batch."""
    if function not in (torch.zeros, torch.ones, torch.arange):
        return False
    whole = not getattr(kwargs.get("dtype"), "is_floating_point", True)
    sizes = args[0] if args and isinstance(args[0], (tuple, list)) else args
    return whole or (function is not torch.arange and len(sizes) == 2)


def _by_places(index: Any) -> Any:
    """An index with the places of what masks choose in place of the masks."""
    found: list[Any] = []
    for part in index if isinstance(index, tuple) else (index,):
        if type(part) is torch.Tensor and part.dtype is torch.bool:
            with _disable_current_modes():
                found += part.nonzero(as_tuple=True)
        else:
            found.append(part)
    return tuple(found)
