"""A component's program compiled by inductor, piece by piece, each kind of piece once."""

from __future__ import annotations

import importlib.util
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ...errors import reason
from ...memory import out_of_memory
from ...turns import alone
from .kinds import Kind, kind_of, made
from .pieces import Cut, cut
from .settings import in_key, kept

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


class Pieces:
    """``program`` in pieces, to be compiled for tensors like ``arguments``: each of its ``regions``
    (see :func:`~.regions.repeated`) is one, and what is between them and between two pushes.

    ``progress`` is told how many of how many are compiled.
    """

    def __init__(
        self,
        program: fx.GraphModule,
        arguments: Sequence[torch.Tensor],
        regions: Mapping[str, int],
        progress: Callable[[int, int], None],
    ) -> None:
        self._cut = cut(program, regions)
        self._arguments, self._progress = arguments, progress
        self._settings = in_key()
        #: the kinds of pieces, with one of each, once they were looked at
        self.kinds: dict[Kind, fx.GraphModule] = {}
        self._count: Counter[Kind] = Counter()
        self._told = 0

    @torch.no_grad()
    def look(self) -> None:
        """Find out of which kinds the pieces are. Runs the program as it is, and raises what that
        raises."""

        def look(name: str, piece: fx.GraphModule, args: tuple[Any, ...]) -> Any:
            kind = kind_of(self._cut.pieces[name], self._settings, args)
            self._count[kind] += 1
            self.kinds[kind] = piece
            return piece(*args)

        _Runner(self._cut, look).run(*self._arguments)

    def ready(self, kinds: Container[Kind]) -> None:
        """Tell how many pieces are compiled, once those of these kinds are."""
        self._tell(sum(count for kind, count in self._count.items() if kind in kinds))

    @torch.no_grad()
    def compile(self) -> Compiled:
        """The program with its pieces compiled.

        Runs it once, so that every kernel is loaded. The result takes and returns what the program
        does, and has the same ``emit`` submodule and weights. A piece that inductor cannot compile
        stays as it is. Raises what the program raises, and where memory lacks.
        """
        program = self._cut.program
        compiled = Compiled(program)

        def run(name: str, piece: fx.GraphModule, args: tuple[Any, ...]) -> Any:
            kind = kind_of(self._cut.pieces[name], self._settings, args)
            call = _compiled(kind, piece, args)
            result = None
            if not isinstance(call, str):
                try:
                    result = call(*args)
                except Exception as e:  # what only running it shows
                    call = _known.refuse(kind, e)
            if isinstance(call, str):
                compiled.refused.append(call)
                result = piece(*args)
            else:
                compiled.pieces += 1
                setattr(program, name, _Piece(call))
            self._tell(compiled.pieces + len(compiled.refused))
            return result

        _Runner(self._cut, run).run(*self._arguments)
        return compiled

    def _tell(self, done: int) -> None:
        if done > self._told:
            self._told = done
            self._progress(done, len(self._cut.pieces))


def compile_kind(kind: Kind, piece: fx.GraphModule) -> None:
    """Compile a piece for what its kind is given, if that was not done in this process. Raises
    where memory lacks."""
    _compiled(kind, piece, kind.given)


def compiled_before(kind: Kind) -> bool:
    """Whether pieces of this kind were compiled in this process; or in another one, so that
    inductor's cache on the disk has them."""
    return kind in _known or kind.noted()


class _Piece(nn.Module):
    """A compiled piece of a program."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *args: Any) -> Any:
        return self.call(*args)


class _Runner(fx.Interpreter):
    """Runs a program that was cut into pieces; each piece by ``run``, which is given its name, the
    piece and its arguments."""

    def __init__(
        self, cut: Cut, run: Callable[[str, fx.GraphModule, tuple[Any, ...]], Any]
    ) -> None:
        super().__init__(cut.program)
        self._pieces, self._run = cut.pieces, run

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target not in self._pieces:
            return super().call_module(target, args, kwargs)
        piece = self.module.get_submodule(target)
        assert isinstance(piece, fx.GraphModule)
        return self._run(target, piece, args)


class _Known:
    """What inductor made of pieces in this process, or why it could not."""

    def __init__(self) -> None:
        self._made: OrderedDict[Kind, Callable[..., Any] | str] = OrderedDict()
        self._lock = threading.RLock()

    def __contains__(self, key: Kind) -> bool:
        return key in self._made

    def get(self, key: Kind, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any] | str:
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

    def refuse(self, key: Kind, error: Exception) -> str:
        """Keep why it could not; raises the error where memory lacked."""
        if out_of_memory(error):
            raise error
        with self._lock:
            self._made[key] = why = reason(error)
        return why


#: Code has the number of its device in it: each device has its own. Weights are none of it.
_known = _Known()


def _compiled(kind: Kind, piece: fx.GraphModule, given: Sequence[Any]) -> Callable[..., Any] | str:
    """What inductor makes of a piece, or why it cannot. Where another process is at it, it is
    waited for: inductor finds then what that one has made."""
    shared = kept() and not piece.graph.find_nodes(op="get_attr")  # bodies are like no others

    def make() -> Callable[..., Any]:
        call = made(piece, given)
        if shared:
            kind.note()
        return call

    waits = shared and not compiled_before(kind)
    # Waiting keeps no other thread from what is known: it may be the one that is waited for.
    with alone(kind.turn() if waits else None):
        return _known.get(kind, make)
