"""A component's program compiled by inductor, in segments between pushes.

A boundary value leaves as soon as it exists, so the compiler must not move what computes it behind
what does not need it, nor give its memory to something else while it is pushed. Each stretch of the
program between two pushes is compiled by itself: a value that is pushed is then an output of a
segment, in memory of its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.split_module import split_module

#: Parameters from which on compiling is the default. Smaller denoisers take less than some 3 ms a
#: step in a CUDA graph: compiling would save seconds after thousands of pictures.
_LARGE = 100_000_000


def pays(module: nn.Module, devices: Sequence[torch.device]) -> bool:
    """Whether compiling is the default: for large denoisers, on GPUs that Triton can compile for.

    Not on CPUs, where the time goes into matrix products that are the same in either case.
    """
    if any(d.type != "cuda" or torch.cuda.get_device_capability(d) < (7, 0) for d in devices):
        return False
    large = sum(p.numel() for p in module.parameters()) >= _LARGE
    return large and importlib.util.find_spec("triton") is not None


class _Segment(nn.Module):
    """A compiled piece of a program."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *args: Any) -> Any:
        return self.call(*args)


class _Compiler(fx.Interpreter):
    """Runs a program that was cut into segments, and compiles each on the values that it gets."""

    def __init__(
        self,
        program: fx.GraphModule,
        segments: Sequence[str],
        progress: Callable[[int, int], None],
    ) -> None:
        super().__init__(program)
        self._segments = list(segments)
        self._progress = progress

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in self._segments:
            segment = self.module.get_submodule(target)
            assert isinstance(segment, fx.GraphModule)
            call = torch._inductor.compile(segment, list(args))
            setattr(self.module, target, _Segment(call))
            self._progress(self._segments.index(target) + 1, len(self._segments))
        return super().call_module(target, args, kwargs)


@torch.no_grad()
def compile_program(
    program: fx.GraphModule,
    arguments: Sequence[torch.Tensor],
    progress: Callable[[int, int], None],
) -> fx.GraphModule:
    """``program`` with its segments compiled for tensors like ``arguments``.

    Runs it once, so that every kernel is loaded. ``progress`` is told how many of how many segments
    are compiled. The result takes and returns what ``program`` does, and has the same ``emit``
    submodule. Raises what inductor raises.
    """
    numbers = _number(program.graph)
    cut = split_module(program, program, numbers.__getitem__, keep_original_order=True)
    emit = program.get_submodule("emit")
    cut.add_module("emit", emit)
    names = [f"submod_{n}" for n in sorted(set(numbers.values())) if n % 2 == 0]
    segments = [name for name in names if hasattr(cut, name)]
    _Compiler(cut, segments, progress).run(*arguments)
    return cut


def _number(graph: fx.Graph) -> dict[fx.Node, int]:
    """The segment of every node: even numbers are stretches of computation, odd ones the pushes
    between them."""
    numbers: dict[fx.Node, int] = {}
    number = 0
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if (node.op == "call_module") != bool(number % 2) and node.op != "get_attr":
            number += 1
        numbers[node] = number
    return numbers
