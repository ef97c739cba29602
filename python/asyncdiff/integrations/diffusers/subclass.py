"""The classes that a pipeline and its denoiser have while they are parallelised. Their handle is an
attribute ``_asyncdiff`` of both.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from ...errors import InputError


def twin(module: nn.Module) -> nn.Module:
    """The same denoiser as an object of its own class, sharing every attribute, also those that are
    set later: what is exported."""
    other = object.__new__(type(module))
    object.__setattr__(other, "__dict__", module.__dict__)
    return other


def _named_like(cls: type, base: type) -> type:
    # Pipelines are saved, and components compared, by the names of their classes.
    cls.__name__, cls.__qualname__, cls.__module__ = (
        base.__name__,
        base.__qualname__,
        base.__module__,
    )
    return cls


def _reduce(parallel: Any, protocol: Any) -> Any:
    return parallel.__dict__["_asyncdiff"].__reduce__()


def _shallow_copy(parallel: Any) -> Any:
    """What ``copy.copy`` makes, which would ask for what pickle does."""
    copied = object.__new__(type(parallel))
    copied.__dict__.update(parallel.__dict__)
    return copied


@functools.cache
def denoiser_class(base: Any) -> type:
    """A subclass of a denoiser's class, with the same name, whose forward is its handle's."""

    class Parallel(base):  # type: ignore[misc]
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        @functools.wraps(base.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            handle = self.__dict__.get("_asyncdiff")
            if handle is None:  # after restore(), from a hook that came before it
                return base.forward(self, *args, **kwargs)
            return handle._forward(args, kwargs)

        def compile(self, *args: Any, **kwargs: Any) -> None:
            raise InputError(
                "asyncdiff compiles the components of this denoiser by itself: pass compile=True "
                "to parallelize (the default for large denoisers on GPUs)"
            )

        __reduce_ex__, __copy__ = _reduce, _shallow_copy

        @property
        def device(self) -> torch.device:
            return self.__dict__["_asyncdiff"].denoiser.home

        def to(self, *args: Any, **kwargs: Any) -> Any:
            _, dtype, _, _ = torch._C._nn._parse_to(
                *args, **{k: v for k, v in kwargs.items() if k != "silence_dtype_warnings"}
            )
            if dtype is not None and dtype != next(self.parameters()).dtype:
                raise InputError(
                    f"the denoiser's weights are spread over its ranks: call handle.restore() "
                    f"before changing it to {dtype}"
                )
            return self  # its components lie on their own devices

    return _named_like(Parallel, base)


@functools.cache
def pipeline_class(base: Any) -> type:
    """A subclass of a pipeline's class, with the same name, whose calls its handle runs."""

    class Parallel(base):  # type: ignore[misc]
        @functools.wraps(base.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.__dict__["_asyncdiff"]._run(base.__call__, args, kwargs)

        __reduce_ex__, __copy__ = _reduce, _shallow_copy

    return _named_like(Parallel, base)
