"""What a denoiser's forward depends on besides its arguments, and what of that a captured graph can
follow.

Options of a pipeline may change it between generations: the scale of an adapter, FreeU, layers that
are loaded later. A captured graph has its layers and most options frozen in; the tensors that are
its weights, and numbers that may be moved, are inputs of it.
"""

from __future__ import annotations

import contextlib
import itertools
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..hooks import containers_of_hooks, hooks_of, is_code, is_own
from ..layers.attention import chosen
from .adapters import by_adapter, entries, take_out, unused
from .methods import Methods
from .numbers import Guards
from .structure import Part, Structure, is_number

#: So many states are known again.
_KNOWN = 8
_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)
#: Copies of what is empty. (Dictionaries of hooks have an order, which such have not.)
_EMPTY: dict[type, Any] = {list: [], dict: {}, OrderedDict: {}}
#: Layers that compute the same in training.
_ALIKE = (
    *(nn.Linear, nn.Conv2d, nn.Identity, nn.Sequential),
    *(nn.ModuleDict, nn.ModuleList, nn.ParameterDict),
)


class ModuleState:
    """The layers of a denoiser that compute, their classes and these classes' methods, hooks, the
    shapes of their weights, and the plain values among the attributes of these and of their
    attention processors; and what is chosen for attention beside them."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._layers: list[nn.Module] = []
        self._classes: list[type[Any]] = []
        #: of these classes, and of attention processors'
        self._methods = Methods(())
        #: what may be exchanged in layers, and copies of it
        self._containers: list[Any] = []
        self._copies: list[Any] = []
        self._attention: tuple[Any, ...] = ()
        self._structure: Structure | None = None
        self._guards = Guards()
        #: their numbers, and what they consist of, so that its addresses are nobody else's
        self._known: dict[Any, tuple[int, Any]] = {}
        self._unused = itertools.count(1)
        self._number = 0
        #: what there has been of states, weights by serial number, and numbers
        self._seen: dict[Any, tuple[int, Any]] = {}
        self._serials: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        self._version = 0
        #: whether one look is enough, and whether there was one
        self._settled = self._looked = False

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """Within it nobody changes the denoiser, until :meth:`learn`: it is looked at once, which
        goes through all layers."""
        self._settled, self._looked = True, False
        try:
            yield
        finally:
            self._settled = False

    def number(self) -> int:
        """Another one for every state that needs a graph of its own. Quick as long as nothing
        changes."""
        self._look()
        return self._number

    @property
    def version(self) -> int:
        """Another one for every state, for other tensors as its weights, and for other numbers that
        may be moved."""
        self._look()
        return self._version

    @property
    def structure(self) -> Structure:
        """The layers, weights and numbers that there are now."""
        self._look()
        assert self._structure is not None
        return self._structure

    def learn(self, guards: Guards) -> None:
        """A graph has been made, which may have changed something, and is right for some values of
        numbers only: where that is new, states are others."""
        self._looked = False
        if self._guards.learn(guards):
            self._containers.clear()
            self._copies.clear()
            self._layers.clear()

    def _look(self) -> None:
        if self._settled and self._looked:
            return
        self._looked = True
        if self._unchanged() or self._moved():
            return
        take_out(self._module)
        self._layers = list(self._module.modules())
        self._classes = [*map(type, self._layers)]
        self._methods = Methods(_classes(self._layers))
        self._containers = [x for child in self._layers for x in _containers(child)]
        # Most are empty: one copy stands for these, so that less memory is looked through.
        self._copies = [_EMPTY.get(type(x)) if not x else None for x in self._containers]
        pairs = zip(self._copies, self._containers, strict=True)
        self._copies = [x.copy() if empty is None else empty for empty, x in pairs]
        self._structure = made = Structure(self._module)
        values = {name: slot.value for name, slot in made.slots.items()}
        self._attention = chosen()
        of_layers = _State(made, self._guards, values)
        methods = self._methods.of(_classes(part.layer for part in made.parts))
        state = (*self._attention, methods, *of_layers.taken())
        held = of_layers.held, self._methods.held
        self._number = self._count(self._known, state, held)
        self._count_version()

    def _count_version(self) -> None:
        made = self._structure
        assert made is not None
        values = ((name, slot.value) for name, slot in made.slots.items())
        tensors = ((name, self._serial(t)) for name, t in made.tensors.items())
        inputs = self._number, tuple(values), tuple(tensors)
        self._version = self._count(self._seen, inputs, None)
        if len(self._serials) > 2 * len(made.tensors):  # many are gone
            self._serials = {n: x for n, x in self._serials.items() if x[0]() is not None}

    def _serial(self, tensor: torch.Tensor) -> int:
        """A number that no other tensor has or had, which may lie where another one was."""
        known = self._serials.get(id(tensor))
        if known is None or known[0]() is not tensor:
            self._serials[id(tensor)] = known = weakref.ref(tensor), next(self._unused)
        return known[1]

    def _moved(self) -> bool:
        """Whether nothing but numbers has changed, for which the same graphs are right."""
        if self._structure is None or not self._layers:
            return False
        slots = {(id(s.container), s.key): name for name, s in self._structure.slots.items()}
        changed = []
        try:
            same = self._same_code()
            for i, (now, then) in enumerate(zip(self._containers, self._copies, strict=True)):
                if now == then:
                    continue
                keys = _changed(now, then)
                if not same or keys is None or any((id(now), key) not in slots for key in keys):
                    return False
                changed.append(i)
                for key in keys:
                    name = slots[id(now), key]
                    if not is_number(now[key]):
                        return False
                    if self._guards.of(name, now[key]) != self._guards.of(name, then[key]):
                        return False
        except (RuntimeError, ValueError, TypeError):
            return False
        for i in changed:
            now, then = self._containers[i], self._copies[i]
            for key in _changed(now, then) or ():
                then[key] = now[key]
        if changed:
            self._count_version()
        return bool(changed)

    def _count(self, known: dict[Any, tuple[int, Any]], what: Any, held: Any) -> int:
        """The number of something that may have been there before; ``held`` while it is known, so
        that its addresses are nobody else's."""
        if what not in known:
            known[what] = next(self._unused), held
            if len(known) > _KNOWN:
                del known[next(iter(known))]
        return known[what][0]

    def _unchanged(self) -> bool:
        try:
            # Identity first, for each value.
            same = bool(self._layers) and self._containers == self._copies
            return same and self._same_code()
        except (RuntimeError, ValueError):  # other tensors, which have no truth
            return False

    def _same_code(self) -> bool:
        return (
            [*map(type, self._layers)] == self._classes
            and self._methods.same()
            and chosen() == self._attention
        )


class _State:
    """What tells apart denoisers that need graphs of their own."""

    def __init__(self, structure: Structure, guards: Guards, values: dict[str, float]) -> None:
        self._structure = structure
        #: what is known by its address
        self.held: list[Any] = []
        #: of numbers that may be moved, by where they stand
        self._answers = {
            (id(slot.container), slot.key): (Guards, guards.of(name, values[name]))
            for name, slot in structure.slots.items()
        }

    def taken(self) -> tuple[Any, ...]:
        made = self._structure
        first = {made.name_of(tensor) for tensor in made.tensors.values()}
        tied = tuple((n, made.name_of(t)) for n, t in made.tensors.items() if n not in first)
        return (*map(self._of_part, made.parts), tuple(made.shared), tied)

    def _of_part(self, part: Part) -> tuple[Any, ...]:
        layer, attributes = part.layer, vars(part.layer)
        own = None if part.wraps else part.adapters
        same = type(layer) in _ALIKE
        plain = tuple(
            (n, self._of_attribute(part, n, x))
            for n, x in attributes.items()
            if (str(n)[:1] != "_" or _is_plain(x) or is_code(layer, n, x))
            and n != "forward"
            and not (n == "training" and same)
            and not unused(layer, n)
        )
        weights = tuple(
            (name, None if x is None else (self._own(x), x.shape, x.dtype))
            for where in (layer._parameters, layer._buffers)
            for _, name, x in entries(where, own)
        )
        # Of what adapters wrap, where none is active, the layer stands under its own name.
        inside = tuple((name, child is None) for name, child, _ in part.children())
        hooks = self._frozen(layer._forward_hooks), self._frozen(layer._forward_pre_hooks)
        forward = attributes.get("forward")
        if forward is not None and is_own(forward):
            forward = None
        # A hook of diffusers may be a new one in each call, and wraps the layer's forward anew.
        wrapped = self._frozen(forward and (hooks_of(attributes) or forward))
        return part.name, type(layer), wrapped, plain, weights, inside, hooks

    def _of_attribute(self, part: Part, name: str, value: Any) -> Any:
        if part.wraps and isinstance(value, dict) and by_adapter(part.layer, name):
            return tuple(
                (key, self._frozen_entry(value, place, x))
                for place, key, x in entries(value, part.adapters)
            )
        return self._frozen_entry(vars(part.layer), name, value)

    def _own(self, tensor: torch.Tensor) -> Any:
        """Which one a tensor is that is more than its values: quantised, with labels."""
        if type(tensor) in _PLAIN:
            return None
        self.held.append(tensor)
        return type(tensor), id(tensor)

    def _frozen_entry(self, container: Any, key: Any, value: Any) -> Any:
        answer = self._answers.get((id(container), key))
        if answer is not None:
            return answer
        # A processor may be a new one in each call.
        if key == "processor" and not isinstance(value, nn.Module):
            return type(value), self._frozen(getattr(value, "__dict__", {}))
        return self._frozen(value)

    def _frozen(self, value: Any) -> Any:
        """What a state takes of a value: plain ones as they are, containers entry by entry,
        processors by type and attributes, of all else which object it is. Private attributes count
        where they are plain: some adapters are switched by such."""
        if isinstance(value, (list, tuple)):
            return tuple(self._frozen_entry(value, i, x) for i, x in enumerate(value))
        if _is_plain(value):
            return value
        if isinstance(value, types.MethodType):  # may be bound anew in each call
            self.held.append(value)
            return object, id(value.__func__), id(value.__self__)
        if not isinstance(value, dict):
            self.held.append(value)
            return object, id(value)
        return tuple(
            (n, self._frozen_entry(value, n, x))
            for n, x in value.items()
            if str(n)[:1] != "_" or _is_plain(x)
        )


def _classes(layers: Iterable[nn.Module]) -> dict[type[Any], None]:
    """The classes of layers and of their attention processors."""
    every = ((layer, vars(layer).get("processor")) for layer in layers)
    return dict.fromkeys(type(x) for pair in every for x in pair)


def _changed(now: Any, then: Any) -> list[Any] | None:
    """The keys, or places, whose values are others; None where there are other ones."""
    if isinstance(now, dict):
        if list(now) != list(then):
            return None
        return [key for key, x in now.items() if x is not then[key] and x != then[key]]
    if len(now) != len(then):
        return None
    return [i for i, x in enumerate(now) if x is not then[i] and x != then[i]]


def _containers(layer: nn.Module) -> Iterator[Any]:
    """All dictionaries and lists in which something of a layer's state may be exchanged."""
    attributes = vars(layer)
    yield attributes
    yield from (attributes["_modules"], attributes["_parameters"], attributes["_buffers"])
    yield from (layer._forward_hooks, layer._forward_pre_hooks)
    # Of diffusers' hooks: the layer's forward stays when one below the last is taken away.
    if "_diffusers_hook" in attributes:
        yield from containers_of_hooks(attributes)
    # Of its processor, where that is no submodule.
    own = getattr(attributes.get("processor"), "__dict__", {})
    if own:
        yield own
    for name, value in (*attributes.items(), *own.items()):
        if isinstance(value, list) or (isinstance(value, dict) and name[:1] != "_"):
            yield value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(x) for x in value)
    return value is None or isinstance(value, (bool, int, float, str))
