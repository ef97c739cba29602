"""A batch whose parts are computed at different times: what a pipeline hands to the sampler.

With schedule "pipeline" components work on different pictures of a batch, in turn. A picture's next
step must not wait for the other pictures' noise predictions; but pipelines of diffusers know one
batch only. So the denoiser's output is a :class:`MicroBatched`: a tensor for whoever looks at it,
in fact one tensor for each micro-batch, each computed on a stream of its own. What treats samples
alike (the sampler's step, guidance) is done part by part and waits for nobody; anything else joins
the parts first, once and for all, and goes on with an ordinary tensor.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..graph.batch import BatchSplit
from .views import Views

#: By operation, or "pointwise", what does it part by part: see rules.py.
RULES: dict[Any, Callable[..., Any]] = {}


@dataclass(frozen=True)
class Layout(BatchSplit):
    """How micro-batches lie in a batch, and the stream of each (None on the CPU)."""

    streams: tuple[torch.cuda.Stream | None, ...]

    def of(self, conditions: int) -> Layout:
        """The same for a batch of so many conditions."""
        return replace(self, conditions=conditions)


class MicroBatched(torch.Tensor):
    """A batch in parts. Made by :meth:`of`; see the module."""

    _layout: Layout
    #: None once joined
    _parts: list[torch.Tensor] | None
    _whole: torch.Tensor | None
    #: all that shares memory with it
    views: Views

    @staticmethod
    def of(layout: Layout, parts: Sequence[torch.Tensor]) -> MicroBatched:
        """The batch of these ``parts``, equal in shape and dtype, each ready in order of its
        stream."""
        return made(layout, list(parts), Views())

    @property
    def cut(self) -> Layout:
        """How the parts lie in it."""
        return self._layout

    @property
    def parts(self) -> list[torch.Tensor] | None:
        """A tensor for each micro-batch, ready in order of its stream; None once joined."""
        return self._parts

    def joined(self) -> torch.Tensor:
        """The whole, ready in order of the current stream. It stays whole."""
        if self._whole is None:
            self._whole = _copied(self)
            self._parts = None
            self.views.join()
        return self._whole

    def numpy(self, *, force: bool = False) -> Any:
        """See torch."""
        return self.joined().numpy(force=force)

    def tolist(self) -> Any:
        """See torch."""
        return self.joined().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"MicroBatched({self.joined()!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:  # as an ordinary tensor
        return self.joined().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return self.joined().clone()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        writes = [x for x in written(func, args, kwargs) if isinstance(x, MicroBatched)]
        for x in pytree.tree_leaves((args, kwargs)):
            if isinstance(x, MicroBatched):
                x.views.check(x, any(x is w for w in writes))
        rule = RULES.get(func.overloadpacket)
        if rule is None and _is_pointwise(func):
            rule = RULES["pointwise"]
        if rule is not None:
            out = rule(func, args, kwargs)
            if out is not NotImplemented:
                return out
        return _whole(func, args, kwargs, writes)


def whole(output: Any) -> Any:
    """What a pipeline returned, a tuple or a dict of its own kind, with what is in parts joined."""
    return _mapped(output, MicroBatched.joined)


def in_this_mode(output: Any) -> Any:
    """What a denoiser returned, as tensors of the caller's inference mode, in which there cannot be
    views of others."""
    if not torch.is_inference_mode_enabled():
        return output
    return _mapped(output, lambda x: x if x.parts is None else MicroBatched.of(x.cut, x.parts))


def _mapped(output: Any, change: Callable[[MicroBatched], torch.Tensor]) -> Any:
    if isinstance(output, MicroBatched):
        return change(output)
    if isinstance(output, tuple) and any(isinstance(x, MicroBatched) for x in output):
        return tuple(_mapped(x, change) for x in output)
    if isinstance(output, dict):
        for name, value in output.items():
            if isinstance(value, MicroBatched):
                output[name] = change(value)
    return output


def made(layout: Layout, parts: list[torch.Tensor], views: Views) -> MicroBatched:
    """A batch of these parts, one of ``views``."""
    first = parts[0]
    shape = (first.shape[0] * layout.count, *first.shape[1:])
    # The parts' strides tell which views of it there are.
    out: MicroBatched = torch.Tensor._make_wrapper_subclass(
        MicroBatched, shape, strides=first.stride(), dtype=first.dtype, device=first.device
    )
    out._layout, out._parts, out._whole, out.views = layout, parts, None, views
    views.add(out)
    return out


def _is_pointwise(func: Any) -> bool:
    """Random numbers are not: each micro-batch would be given others than the batch."""
    return torch.Tag.pointwise in func.tags and torch.Tag.nondeterministic_seeded not in func.tags


def _whole(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], writes: Sequence[MicroBatched]
) -> Any:
    """An operation on joined tensors. Those that it writes to stay in parts, of which others may
    have views."""
    given, spec = pytree.tree_flatten((args, kwargs))
    plain: dict[int, torch.Tensor] = {}
    for x in given:
        if isinstance(x, MicroBatched):
            again = x.parts is not None and any(x is w for w in writes)
            plain[id(x)] = _copied(x) if again else x.joined()
    args, kwargs = pytree.tree_unflatten([plain.get(id(x), x) for x in given], spec)
    out = func(*args, **kwargs)
    for x in writes:
        if x.parts is not None:
            _scatter(plain[id(x)], x)
    if any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.returns):
        for x in given:
            if isinstance(x, MicroBatched):
                x.views.view()
    # In place: whoever goes on with the result goes on with what was given.
    same = {id(plain[id(x)]): x for x in writes}
    return pytree.tree_map(lambda x: same.get(id(x), x), out)


def _copied(x: MicroBatched) -> torch.Tensor:
    """The whole, ready in order of the current stream; ``x`` stays in parts."""
    assert x.parts is not None
    for part, stream in zip(x.parts, x.cut.streams, strict=True):
        if stream is not None:
            now = torch.cuda.current_stream(part.device)
            now.wait_stream(stream)
            part.record_stream(now)
    return x.cut.join(x.parts)


def _scatter(whole: torch.Tensor, x: MicroBatched) -> None:
    """Write ``whole`` to the parts of ``x``."""
    assert x.parts is not None
    for index, (part, stream) in enumerate(zip(x.parts, x.cut.streams, strict=True)):
        with on_stream(stream, [whole]):
            part.copy_(x.cut.part(whole, index))


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream | None, plain: Sequence[torch.Tensor]) -> Iterator[None]:
    """Inside, work goes to ``stream``, after what made these tensors on the current stream."""
    if stream is None:
        yield
        return
    on_gpu = [t for t in plain if t.is_cuda]
    if on_gpu:
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        for tensor in on_gpu:
            tensor.record_stream(stream)
    with torch.cuda.stream(stream):
        yield


def written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that ``func`` writes to."""
    given = [args[i] if i < len(args) else kwargs.get(name) for i, name in _writes_to(func)]
    return [x for x in given if x is not None]


@functools.cache
def _writes_to(func: Any) -> list[tuple[int, str]]:
    """Places and names of those arguments."""
    return [
        (i, argument.name)
        for i, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
