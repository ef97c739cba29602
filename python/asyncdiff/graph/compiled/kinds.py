"""Kinds of pieces: what a piece computes, for values that are laid out in one way."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from .settings import of_architecture

#: Bytes that what lies in GPUs' memory is a multiple of, where code may rely on it.
_ALIGNMENT = 16


class Layout(NamedTuple):
    """What the code for a tensor depends on. ``offset``: elements from where it would be aligned,
    on GPUs."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    offset: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Layout:
        """The layout of a tensor."""
        size, device = tensor.element_size(), tensor.device
        odd = 0 if device.type == "cpu" else tensor.storage_offset() * size % _ALIGNMENT
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, device, odd // size)

    def example(self) -> torch.Tensor:
        """A tensor that is laid out like that; of no memory in a FakeTensorMode."""
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        if not self.offset or 0 in self.shape:
            return torch.empty_strided(self.shape, self.stride, **options)
        extent = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        flat = torch.empty(self.offset + extent, **options)
        return flat.as_strided(self.shape, self.stride, self.offset)


class Kind(NamedTuple):
    """A kind of pieces: the digest of what they compute, the settings, and what is ``given`` to
    them: layouts, and in the place of what is no plain tensor what its ``repr`` or layout is."""

    digest: str
    settings: Any
    given: tuple[Any, ...]

    @property
    def device(self) -> torch.device:
        """Where pieces of this kind run."""
        found = (x.device for x in self.given if isinstance(x, Layout))
        return next(found, torch.device("cpu"))

    @property
    def elsewhere(self) -> Any:
        """What is equal for kinds that differ in nothing but their device, of the same model."""
        given = (x[:3] + x[4:] if isinstance(x, Layout) else x for x in self.given)
        return (self.digest, self.settings, *given, _model(self.device))

    def note(self) -> None:
        """Note beside inductor's cache that it was compiled."""
        with contextlib.suppress(OSError):
            path = self._noted()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def noted(self) -> bool:
        """Whether this was compiled before, so that inductor's cache should have it."""
        return self._noted().exists()

    def turn(self) -> Path | None:
        """Where the process that compiles this says so, until it has (see :mod:`~asyncdiff.turns`);
        None: nobody does."""
        path = self._noted().with_suffix(".lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError:
            return None
        return path

    def _noted(self) -> Path:
        from torch._inductor.codecache import cache_dir  # type: ignore[attr-defined]

        said = repr((*self, torch.__version__, torch.get_num_threads(), _model(self.device)))
        return Path(cache_dir(), "asyncdiff", hashlib.sha256(said.encode()).hexdigest())


def _model(device: torch.device) -> str:
    """What a GPU is called; others are all alike."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def kind_of(digest: str, settings: Any, arguments: Sequence[Any]) -> Kind:
    """The kind of a piece that is given these arguments."""
    return Kind(digest, settings, tuple(map(_in_kind, arguments)))


def made(piece: fx.GraphModule, given: Sequence[Any]) -> Callable[..., Any]:
    """What inductor makes of a piece for what is given to it: layouts, tensors or other values.

    It keeps on the disk only what was traced where sizes may vary, as torch.compile does. Here none
    of them does.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def example(x: Any) -> Any:
        if isinstance(x, torch.Tensor) and not plain(x):
            return mode.from_tensor(x, static_shapes=True)
        if not isinstance(x, (torch.Tensor, Layout)):
            return x
        with mode:
            return (x if isinstance(x, Layout) else Layout.of(x)).example()

    examples = [example(x) for x in given]
    found = (x.device for x in given if isinstance(x, (Layout, torch.Tensor)))
    where = next(found, torch.device("cpu"))
    with of_architecture(where), tracing(TracingContext(mode)):
        # A copy: inductor rewrites what it is given, and the piece may have to run as it is.
        call: Callable[..., Any] = torch._inductor.compile(copy.deepcopy(piece), examples)
    return call


def plain(value: Any) -> bool:
    """Whether a value is a tensor that its layout says all of."""
    return type(value) in (torch.Tensor, torch.nn.Parameter)


def _in_kind(value: Any) -> Any:
    if plain(value):
        return Layout.of(value)
    return (type(value), Layout.of(value)) if isinstance(value, torch.Tensor) else repr(value)
