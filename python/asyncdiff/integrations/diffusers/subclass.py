"""The classes that a pipeline and its denoiser have while they are parallelised."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from ...errors import InputError
from .background import plainly

#: The attribute of a parallelised pipeline or denoiser that is its handle; of a denoiser, that
#: which serves its calls.
HANDLE, CALLS = "_asyncdiff", "_asyncdiff_calls"


def twin(module: nn.Module) -> nn.Module:
    """The same denoiser as another object, sharing every attribute, also those that are set later:
    what is exported. It has none of the denoiser's own hooks, which run when that is called."""
    other: nn.Module = object.__new__(_twin_class(cast(Any, type(module))))
    object.__setattr__(other, "__dict__", module.__dict__)
    return other


def original(parallel: Any) -> type:
    """The class that a pipeline or denoiser had before it was given one of this module's."""
    return type(parallel).__bases__[0]


@functools.cache
def _twin_class(base: Any) -> type:
    class Twin(base):  # type: ignore[misc]
        """A property hides what the shared attributes hold under the same name."""

        _forward_hooks = _forward_pre_hooks = property(lambda self: {})
        _backward_hooks = _backward_pre_hooks = property(lambda self: {})
        _compiled_call_impl = property(lambda self: None)

    return named_like(Twin, base)


def named_like(cls: type, base: type) -> type:
    """``cls`` under the name of ``base``."""
    # Pipelines are saved, and components compared, by the names of their classes.
    cls.__name__, cls.__qualname__, cls.__module__ = (
        base.__name__,
        base.__qualname__,
        base.__module__,
    )
    return cls


def _reduce(parallel: Any, protocol: Any) -> Any:
    return parallel.__dict__[HANDLE].__reduce__()


def _shallow_copy(parallel: Any) -> Any:
    """What ``copy.copy`` makes, which would ask for what pickle does."""
    copied = object.__new__(type(parallel))
    copied.__dict__.update(parallel.__dict__)
    parallel.__dict__[HANDLE].take(copied, type(parallel))
    return copied


@functools.cache
def denoiser_class(base: Any) -> type:
    """A subclass of a denoiser's class, with the same name, whose forward is its handle's."""

    class Parallel(base):  # type: ignore[misc]
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        @functools.wraps(base.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            handle = self.__dict__.get(HANDLE)
            if handle is None:  # after restore(), from a hook that came before it
                return base.forward(self, *args, **kwargs)
            return handle.forward(self.__dict__[CALLS], args, kwargs)

        def compile(self, *args: Any, **kwargs: Any) -> None:
            raise InputError(
                "asyncdiff compiles the components of this denoiser by itself: pass compile=True "
                "to parallelize (the default for large denoisers on GPUs)"
            )

        __reduce_ex__, __copy__ = _reduce, _shallow_copy

        @property
        def device(self) -> torch.device:
            return self.__dict__[CALLS].denoiser.home

        def to(self, *args: Any, **kwargs: Any) -> Any:
            _, dtype, _, _ = torch._C._nn._parse_to(
                *args, **{k: v for k, v in kwargs.items() if k != "silence_dtype_warnings"}
            )
            self.__dict__[CALLS].check_dtype(dtype)
            return self  # its components lie on their own devices

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            """What ``half()``, ``float()``, ``cuda()`` and the like end in."""
            calls = self.__dict__[CALLS]
            if calls.dtype is not None:
                calls.check_dtype(fn(torch.empty(0, dtype=calls.dtype)).dtype)
            return self

    if hasattr(base, "cache_context"):  # diffusers' name for what one of several calls is about

        @contextlib.contextmanager
        def cache_context(self: Any, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
            calls = self.__dict__.get(CALLS)
            ours = calls is not None and plainly.get() is None
            named = calls.named(name) if ours else contextlib.nullcontext()
            with base.cache_context(self, name, *args, **kwargs), named:
                yield

        Parallel.cache_context = cache_context
    return named_like(Parallel, base)


@functools.cache
def pipeline_class(base: Any) -> type:
    """A subclass of a pipeline's class, with the same name, whose calls its handle runs."""

    class Parallel(base):  # type: ignore[misc]
        @functools.wraps(base.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            handle = self.__dict__.get(HANDLE)
            if handle is None:  # restored by another thread just now
                return base.__call__(self, *args, **kwargs)
            return handle.run(self, base.__call__, args, kwargs)

        def to(self, *args: Any, **kwargs: Any) -> Any:
            # Before it has converted the text encoders.
            for dtype in (kwargs.get("dtype"), *args):
                if isinstance(dtype, torch.dtype):
                    self.__dict__[HANDLE].check_dtype(dtype)
            return base.to(self, *args, **kwargs)

        def progress_bar(self, *args: Any, **kwargs: Any) -> Any:
            shown = base.progress_bar(self, *args, **kwargs)
            handle = self.__dict__.get(HANDLE)
            if handle is not None:
                handle.show(shown)
            return shown

        __reduce_ex__, __copy__ = _reduce, _shallow_copy

    for name in filter(functools.partial(hasattr, base), _OF_OTHER_PARTS):
        setattr(Parallel, name, _of_other_parts(getattr(base, name)))
    if hasattr(base, "components"):
        Parallel.components = property(_components(base))
    return named_like(Parallel, base)


#: What a pipeline does with all of its models that it runs by itself, and says of them.
_OF_OTHER_PARTS = (
    *("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"),
    "_execution_device",
)
#: An attribute of a pipeline that does one of these.
_WITHOUT = "_asyncdiff_without_denoisers"


def _of_other_parts(theirs: Any) -> Any:
    """A pipeline's method or property, which is to leave its denoisers out: their components are on
    the devices where they belong."""
    is_property = isinstance(theirs, property)
    call: Any = theirs.fget if is_property else theirs

    @functools.wraps(call)
    def ours(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = self.__dict__.get(_WITHOUT, False)
        self.__dict__[_WITHOUT] = True
        try:
            return call(self, *args, **kwargs)
        finally:
            self.__dict__[_WITHOUT] = before

    return property(ours) if is_property else ours


def _components(base: Any) -> Any:
    def components(self: Any) -> dict[str, Any]:
        every: dict[str, Any] = base.components.fget(self)
        handle = self.__dict__.get(HANDLE)
        if handle is None or not self.__dict__.get(_WITHOUT, False):
            return every
        return {name: part for name, part in every.items() if name not in handle.names}

    return components
