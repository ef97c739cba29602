"""Layers that a denoiser has many times, of which the exporter traces the first one only.

Where a layer is like one that was traced before (:mod:`..state.alike`), and is given tensors of the
same shapes, one operation stands for it while the denoiser is exported. In the graph the nodes of
the first one are then put in its place, with its own weights. So the graph has the same nodes in
the same order as if all had been traced, which takes milliseconds a node.
"""

from __future__ import annotations

import contextlib
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from ..layers.attention import chosen
from ..state.alike import Kinds, storage
from .bodies import Body, UnfollowedError, edge, put_in, repeat

#: Layers without parts that a layer has at least, to be worth it.
_LEAST = 6
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
#: Keys of dictionaries that layers are given which do not count for what they compute: by how the
#: names of modules begin that have their classes, and by the dictionary's name as an argument.
_UNREAD: dict[str, dict[str, frozenset[str]]] = {}


def unread(modules: str, argument: str, keys: Collection[str]) -> None:
    """Declare that layers, of classes from modules whose names begin so, do not compute anything
    else for other values of these keys of a dictionary, their keyword ``argument``: such as the
    number of a block, which would make each of them another kind."""
    _UNREAD.setdefault(modules, {})[argument] = frozenset(keys)


class Repeats:
    """The layers of ``module`` that may be repeats of each other, for one export of it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._kinds = Kinds()
        self._layers = list(self._several())
        #: kinds of calls, and what was traced; None where that cannot stand for others
        self._seen: list[tuple[Any, Body | None]] = []
        self._bodies: list[Body | None] = []
        self._called: set[str] = set()
        self._replaced: set[str] = set()

    def _several(self) -> Iterator[tuple[str, nn.Module]]:
        """Layers of which there are several of one kind."""
        kinds = self._kinds.of_parts(self._module)
        counts = Counter(kinds.values())
        every = dict(self._module.named_modules(remove_duplicate=False))
        places = Counter(map(id, every.values()))
        for path, number in kinds.items():
            layer = every[path]
            if not path or counts[number] < 2 or not layer._modules:
                continue
            own = "forward" in vars(layer) or type(layer).forward is nn.Module.forward
            once = places[id(layer)] == 1  # its nodes are called by its path
            if once and not own and sum(not part._modules for part in layer.modules()) >= _LEAST:
                yield path, layer

    @contextlib.contextmanager
    def standing_in(self) -> Iterator[None]:
        """Open while the exporter runs."""
        for path, layer in self._layers:
            layer.forward = self._standing_in(path, layer, layer.forward)
        _OPEN.append(self)
        try:
            yield
        finally:
            _OPEN.pop()
            for _, layer in self._layers:
                del layer.forward

    def _standing_in(self, path: str, layer: nn.Module, forward: Any) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            if path in self._replaced:  # a second call has other names for its modules
                raise UnfollowedError(f"{path} is called twice")
            first = path not in self._called
            self._called.add(path)
            leaves, _ = pytree.tree_flatten((args, kwargs))
            kind = self._kind(layer, args, kwargs) if first else None
            if kind is None:
                return forward(*args, **kwargs)

            def alone() -> bool:
                """Whether the call leaves nothing behind for others but its result."""
                now, _ = pytree.tree_flatten((args, kwargs))
                same = len(now) == len(leaves) and all(map(operator.is_, now, leaves))
                return same and self._kind(layer, args, kwargs) == kind

            body = next((body for seen, body in self._seen if seen == kind), _NONE)
            if body is _NONE:
                place = len(self._seen)
                self._seen.append((kind, None))
                result, made = self._trace(
                    path, layer, leaves, lambda: forward(*args, **kwargs), alone
                )
                self._seen[place] = kind, made  # not before: it is no repeat of itself
                return result
            if body is None:
                return forward(*args, **kwargs)
            self._replaced.add(path)
            return self._repeated(body, path, leaves)

        return called

    def _kind(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What is the same for calls that compute the same; None where that is not known."""
        leaves, spec = pytree.tree_flatten((args, _read(layer, kwargs)))
        with torch._C.DisableTorchFunction():
            like = self._kinds.of(layer)
            given = None if like is None else _described(leaves, self._kinds.memory)
        return None if given is None else (like, given, spec, chosen())

    def _trace(
        self,
        path: str,
        layer: nn.Module,
        leaves: list[Any],
        call: Callable[[], Any],
        alone: Callable[[], bool],
    ) -> tuple[Any, Body | None]:
        number = len(self._bodies)
        self._bodies.append(None)
        edge(_tensors(leaves), number, False)
        result = call()
        out, spec = pytree.tree_flatten(result)
        returns = _returns(leaves, out)
        if returns is None or not alone():
            return result, None
        made = [out[i] for i, (where, _) in enumerate(returns) if where == "made"]
        body = Body(number, path, layer, spec, returns, made)
        self._bodies[number] = body
        edge(made, number, True)
        return result, body

    def _repeated(self, body: Body, path: str, leaves: list[Any]) -> Any:
        made = repeat(_tensors(leaves), body.number, path)
        places = {"made": made, "given": leaves}
        out = [x if where == "plain" else places[where][x] for where, x in body.returns]
        return pytree.tree_unflatten(out, body.spec)

    def results(self, number: int) -> list[Tensor]:
        """Tensors like those that a body made."""
        body = self._bodies[number]
        assert body is not None
        memory = dict[int, Tensor]()
        return [_like(x, memory) for x in body.made]

    def put_in(self, program: Any) -> None:
        """Put what was traced in the place of its repeats, in the program that was exported while
        this stood in. Raises UnfollowedError where that cannot be."""
        with torch._C.DisableTorchFunction():  # of modes that see each look at a shape
            put_in(self._module, program, self._bodies)


#: The export under way.
_OPEN: list[Repeats] = []
_NONE: Any = object()


@repeat.register_fake
def _like_the_first(inputs: list[Tensor], body: int, path: str) -> list[Tensor]:
    return _OPEN[-1].results(body)


def _read(layer: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those keyword arguments without what the layer does not read; tensors always count."""
    of_layer = type(layer).__module__
    names = next((n for start, n in _UNREAD.items() if of_layer.startswith(start)), None)
    if names is None:
        return kwargs
    out = dict(kwargs)
    for name in names.keys() & kwargs.keys():
        if type(kwargs[name]) is dict:
            out[name] = {
                key: value
                for key, value in kwargs[name].items()
                if key not in names[name] or _tensors(pytree.tree_leaves(value))
            }
    return out


def _tensors(leaves: list[Any]) -> list[Tensor]:
    return [x for x in leaves if isinstance(x, Tensor)]


def _described(leaves: list[Any], memory: Collection[int]) -> list[Any] | None:
    """What two layers have to be given alike; None where that is not known, as of what lies in
    ``memory`` that the layer knows of besides. Tensors count by shape, and by which of them are the
    same, or share memory."""
    found: list[Any] = []
    tensors: list[Tensor] = []
    for leaf in leaves:
        if isinstance(leaf, FakeTensor):
            if leaf.constant is not None or not all(isinstance(n, int) for n in leaf.shape):
                return None
            if storage(leaf) in memory:
                return None
            same = next((i for i, x in enumerate(tensors) if x is leaf), len(tensors))
            beside = next(
                (i for i, x in enumerate(tensors) if storage(x) == storage(leaf)), len(tensors)
            )
            tensors.append(leaf)
            layout = leaf.stride(), leaf.storage_offset(), leaf.dtype, leaf.device
            found.append((tuple(leaf.shape), layout, same, beside))
        elif isinstance(leaf, _PLAIN):
            found.append((type(leaf), leaf))
        else:
            return None
    return found


def _like(x: Tensor, memory: dict[int, Tensor]) -> Tensor:
    """A tensor like another one, in ``memory`` that is shared as that is."""
    count = x.untyped_storage().nbytes() // x.element_size()
    if storage(x) not in memory:
        memory[storage(x)] = torch.empty(count, dtype=x.dtype, device=x.device)
    return memory[storage(x)].as_strided(x.shape, x.stride(), x.storage_offset())


def _returns(leaves: list[Any], out: list[Any]) -> list[tuple[str, Any]] | None:
    """Where each part of a result is from; None where it shares memory with what was given, or is
    nothing that is known."""
    found: list[tuple[str, Any]] = []
    memory = {storage(x) for x in _tensors(leaves)}
    made = 0
    for x in out:
        given = next((i for i, leaf in enumerate(leaves) if leaf is x), None)
        if isinstance(x, _PLAIN):
            found.append(("plain", x))
        elif given is not None:
            found.append(("given", given))
        elif isinstance(x, FakeTensor) and x.constant is None and storage(x) not in memory:
            found.append(("made", made))
            made += 1
        else:
            return None
    return found if made else None
