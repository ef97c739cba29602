"""A component's program compiled by inductor, piece by piece, each kind of piece once."""

from __future__ import annotations

import copy
import importlib.util
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ...errors import reason
from ...memory import out_of_memory
from .pieces import cut

#: Parameters from which on compiling is the default. Smaller denoisers take less than some 3 ms a
#: step in a CUDA graph: compiling would save seconds after thousands of pictures.
_LARGE = 100_000_000
#: So many compiled pieces are kept, more than a denoiser has kinds of.
_KEPT = 1024


def pays(module: nn.Module, devices: Sequence[torch.device]) -> bool:
    """Whether compiling is the default: for large denoisers, on GPUs that Triton can compile for.

    Not on CPUs, where the time goes into matrix products that are the same in either case.
    """
    if any(d.type != "cuda" or torch.cuda.get_device_capability(d) < (7, 0) for d in devices):
        return False
    large = sum(p.numel() for p in module.parameters()) >= _LARGE
    return large and importlib.util.find_spec("triton") is not None


@dataclass
class Compiled:
    """A program with its pieces compiled: how many were, and why others could not be."""

    program: fx.GraphModule
    pieces: int = 0
    refused: list[str] = field(default_factory=list)


@torch.no_grad()
def compile_program(
    program: fx.GraphModule,
    arguments: Sequence[torch.Tensor],
    regions: Mapping[str, int],
    progress: Callable[[int, int], None],
) -> Compiled:
    """``program`` with its pieces compiled for tensors like ``arguments``: each of its ``regions``
    (see :func:`~.regions.repeated`) is one, and what is between them and between two pushes.

    Runs it once, so that every kernel is loaded. ``progress`` is told how many of how many pieces
    are compiled. The result takes and returns what ``program`` does, and has the same ``emit``
    submodule and weights. A piece that inductor cannot compile stays as it is. Raises what the
    program raises, and where memory lacks.
    """
    made = cut(program, regions)
    compiled = Compiled(made.program)
    _Compiler(compiled, made.pieces, progress).run(*arguments)
    return compiled


class _Piece(nn.Module):
    """A compiled piece of a program."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *args: Any) -> Any:
        return self.call(*args)


class _Compiler(fx.Interpreter):
    """Runs a program that was cut into pieces, and compiles each for the values that it gets."""

    def __init__(
        self, compiled: Compiled, pieces: Mapping[str, str], progress: Callable[[int, int], None]
    ) -> None:
        super().__init__(compiled.program)
        self._compiled, self._pieces, self._progress = compiled, pieces, progress
        self._settings = _settings()

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target not in self._pieces:
            return super().call_module(target, args, kwargs)
        piece = self.module.get_submodule(target)
        assert isinstance(piece, fx.GraphModule)
        key = (self._pieces[target], self._settings, *map(_layout, args))
        call = _known.get(key, lambda: _made(piece, args))
        result = None
        if not isinstance(call, str):
            try:
                result = call(*args)
            except Exception as e:  # what only running it shows
                call = _known.refuse(key, e)
        if isinstance(call, str):
            self._compiled.refused.append(call)
            result = piece(*args)
        else:
            self._compiled.pieces += 1
            setattr(self.module, target, _Piece(call))
        done = self._compiled.pieces + len(self._compiled.refused)
        self._progress(done, len(self._pieces))
        return result


class _Known:
    """What inductor made of pieces in this process, or why it could not."""

    def __init__(self) -> None:
        self._made: OrderedDict[Any, Callable[..., Any] | str] = OrderedDict()
        self._lock = threading.RLock()

    def get(self, key: Any, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any] | str:
        """What was made of a piece like this, or is now."""
        with self._lock:
            if key not in self._made:
                try:
                    self._made[key] = make()
                except Exception as e:  # whatever the piece does that inductor cannot take
                    self.refuse(key, e)
                if len(self._made) > _KEPT:
                    self._made.popitem(last=False)
            self._made.move_to_end(key)
            return self._made[key]

    def refuse(self, key: Any, error: Exception) -> str:
        """Keep why it could not; raises the error where memory lacked."""
        if out_of_memory(error):
            raise error
        with self._lock:
            self._made[key] = why = reason(error)
        return why


#: Code has the number of its device in it: each device has its own. Weights are none of it.
_known = _Known()


def _made(piece: fx.GraphModule, arguments: Sequence[Any]) -> Callable[..., Any]:
    """What inductor makes of a piece.

    It keeps on the disk only what was traced where sizes may vary, as torch.compile does. Here none
    of them does.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())
    examples = [
        mode.from_tensor(x, static_shapes=True) if isinstance(x, torch.Tensor) else x
        for x in arguments
    ]
    with tracing(TracingContext(mode)):
        # A copy: inductor rewrites what it is given, and the piece may have to run as it is.
        call: Callable[..., Any] = torch._inductor.compile(copy.deepcopy(piece), examples)
    return call


def _layout(value: Any) -> Any:
    """What the code for a value depends on."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    # On GPUs, code for what is aligned copies what is not.
    odd = value.device.type != "cpu" and value.data_ptr() % 16 != 0
    return (value.shape, value.stride(), value.dtype, value.device, odd)


def _settings() -> Any:
    """What the code depends on besides."""
    from torch._inductor import config

    return (
        config.get_hash(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
    )
