"""Code of a graph, made when it is first called.

torch.fx writes and compiles Python for every GraphModule. Those that torch.export makes on its way
are hardly ever called, nor is what it returns, nor a component's program before it is taken apart.
(torch has the like for inductor, ``_LazyGraphModule``, but not for what it exports.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx
from torch.fx.graph import _PyTreeCodeGen

_recompile = fx.GraphModule.recompile
#: Whether torch is new enough.
_CAN_WAIT = hasattr(fx.GraphModule, "_recompile_submodules")


@contextmanager
def uncompiled() -> Iterator[None]:
    """Graph modules that are made or recompiled meanwhile get their code when it is asked for."""
    if not _CAN_WAIT:
        yield
        return
    before = fx.GraphModule.recompile
    fx.GraphModule.recompile = _later  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        fx.GraphModule.recompile = before  # type: ignore[method-assign]


class LazyModule(fx.GraphModule):
    """A graph module that gets its code when it is first called, or its code is asked for."""

    def recompile(self) -> Any:
        """Have the code written anew, later."""
        return _later(self) if _CAN_WAIT else _recompile(self)

    def __reduce__(self) -> Any:
        """What pickle keeps, which is the code."""
        _recompile(self)
        cls: Any = type(self)
        cls.recompile = _recompile  # whose result is asked for
        try:
            return super().__reduce__()
        finally:
            del cls.recompile


class _Code:
    """In the place of a module's code that is not written yet; then the module has its own."""

    def __get__(self, module: fx.GraphModule | None, _: type) -> Any:
        if module is None:
            return self
        _recompile(module)
        return module.__dict__["_code"]


def _later(module: fx.GraphModule) -> None:
    cls: Any = type(module)  # each has one of its own
    codegen = module.graph._codegen
    if isinstance(codegen, _PyTreeCodeGen):
        module._in_spec = codegen.pytree_info.in_spec
        module._out_spec = codegen.pytree_info.out_spec
    cls.forward, cls._code = _forward, _Code()
    module.__dict__.pop("_code", None)
    module._recompile_submodules()


def _forward(module: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    _recompile(module)
    return module.forward(*args, **kwargs)
