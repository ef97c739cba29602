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


def _later(module: fx.GraphModule) -> None:
    cls: Any = type(module)  # each has one of its own
    codegen = module.graph._codegen
    if isinstance(codegen, _PyTreeCodeGen):
        module._in_spec = codegen.pytree_info.in_spec
        module._out_spec = codegen.pytree_info.out_spec
    cls.forward, cls.code = _forward, property(_code)
    module._recompile_submodules()


def _forward(module: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    _recompile(module)
    return module.forward(*args, **kwargs)


def _code(module: fx.GraphModule) -> str:
    if type(module).forward is _forward:
        _recompile(module)
    return module._code
