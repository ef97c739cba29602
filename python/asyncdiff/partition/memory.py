"""How much memory components need, estimated from the exported graph: what limits of a cut count.

A component holds its weights, as they are stored; mailboxes, so many slots of what others send it;
what it computes ahead, once a generation and for each timestep; and its activations: the most that
values of a run take at once, in the graph's order, each from when it is computed until it is read
last. What libraries take for themselves (workspaces, a context, what an allocator cannot use) is
not in it.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from ..errors import InputError, MemoryLimitError
from ..graph.capture import Captured, nbytes_of
from ..graph.layers.quantized import parts_of
from ..graph.row import TABLE_BYTES

#: Steps of a generation for whose rows there is room.
_STEPS = 50


@dataclass(frozen=True)
class Use:
    """Bytes that a component needs, by what for. ``ahead``: what is computed once a generation, and
    for each of fifty timesteps."""

    weights: int
    mailboxes: int
    activations: int
    ahead: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.mailboxes + self.activations + self.ahead

    def to_dict(self) -> dict[str, int]:
        """Plain data for JSON."""
        return asdict(self) | {"total": self.total}

    def __str__(self) -> str:
        return (
            f"{in_words(self.total)} ({in_words(self.weights)} weights, "
            f"{in_words(self.activations)} activations, {in_words(self.mailboxes)} mailboxes, "
            f"{in_words(self.ahead)} computed ahead)"
        )


@dataclass(frozen=True)
class Limits:
    """How many bytes each component may need (None: any number), with ``slots`` in its mailboxes.
    ``engines``: how many share its weights, each with mailboxes and activations of its own.
    ``free``: these are what is free on the devices, and not what the user allows. ``runs``: whether
    activations, which are an estimate, count. ``compressed``: whether what crosses is compressed,
    for which both ends keep values, too. ``of_weights``: bytes of each weight, where they are not
    those that it has."""

    each: tuple[int | None, ...]
    slots: int = 2
    engines: int = 1
    free: bool = False
    runs: bool = True
    compressed: bool = False
    of_weights: Mapping[str, int] | None = None

    def mailboxes(self, read: Any, sent: Any) -> Any:
        """Bytes of all mailboxes for bundles of which so many bytes are read and sent."""
        if not self.compressed:
            return self.engines * self.slots * read
        # At the reader those of whole bundles and of codes, at most half as large, and the values;
        # at the sender the values, and codes on their way, of which there is one bundle.
        return self.engines * (self.slots * (2.5 * read + sent) + 0.5 * sent)

    def over(self, uses: Sequence[Use]) -> bool:
        """Whether components need more than they may."""
        return any(
            limit is not None and use.total > limit
            for use, limit in zip(uses, self.each, strict=True)
        )


#: Bytes of units of sizes.
_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", 1):
    _UNITS |= dict.fromkeys((_letter, f"{_letter}B"), 1000**_power)
    _UNITS |= dict.fromkeys((f"{_letter}I", f"{_letter}IB"), 1024**_power)


def read_size(text: Any) -> int:
    """Bytes, of a number of them or of a text as ``"10GB"`` (10⁹) or ``"9.5GiB"`` (2³⁰). Raises
    ValueError for what is neither, or not positive."""
    found = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]*)\s*", str(text))
    if found is None or isinstance(text, bool) or found[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is no size")
    size = float(found[1]) * _UNITS[found[2].upper()]
    if not 1 <= size < math.inf:
        raise ValueError(f"{text!r} is no size")
    return int(size)


def read_memory(given: Any) -> int | tuple[int | None, ...] | None:
    """The setting as it is kept: bytes for each rank, or a tuple with an entry for each. Raises
    InputError for what is no size."""
    if given is None:
        return None
    try:
        if isinstance(given, (int, float, str)):
            return read_size(given)
        return tuple(None if entry is None else read_size(entry) for entry in given)
    except (TypeError, ValueError) as e:
        raise InputError(
            f"memory={given!r}: write what components may take, in bytes or as '10GB' or '9.5GiB', "
            "for all ranks or as a list with an entry for each (None: what is free)"
        ) from e


def no_room(
    needs: Sequence[float], limits: Limits, cut: str = "under the closest cut they would need"
) -> MemoryLimitError:
    """What to raise where no cut fits; ``needs`` are those of the components under the closest
    one, or what ``cut`` says."""
    told = []
    for i, (need, limit) in enumerate(zip(needs, limits.each, strict=True)):
        of = "" if limit is None else f" of {in_words(limit)}"
        told.append(f"component {i} {in_words(need)}{of}")
    where = "free on their devices" if limits.free else "that they may take (memory)"
    return MemoryLimitError(
        f"the denoiser's {len(needs)} components do not fit into the memory {where}: {cut} "
        f"{', '.join(told)}. Take more components, quantised weights, smaller pictures or batches, "
        "or devices with more memory (`asyncdiff plan --memory` says what fits)"
    )


def in_words(nbytes: float) -> str:
    """Bytes as people write them: in GB of 10⁹, smaller numbers in MB, and the smallest in kB."""
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:.2f} GB"
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:.1f} kB"


def weight_bytes(captured: Captured, limits: Limits | None = None) -> Mapping[str, int]:
    """Bytes of each weight, by placeholder."""
    if limits is not None and limits.of_weights is not None:
        return limits.of_weights
    return {name: w.numel() * w.element_size() for name, w in captured.weights.items()}


def base_of(captured: Captured, node: fx.Node) -> fx.Node:
    """The node whose memory a node's value lies in."""
    while node in captured.views or node.target is operator.getitem:
        node = node.all_input_nodes[0]
    return node


def _is_ahead(captured: Captured, node: fx.Node) -> bool:
    return node in captured.once or node in captured.timed


def of_nodes(
    captured: Captured,
    nodes: Sequence[fx.Node],
    weights: Iterable[str],
    read: int,
    sent: int,
    inputs: Iterable[fx.Node],
    limits: Limits | None = None,
) -> Use:
    """What a component of these ``nodes``, in order, needs. ``read`` and ``sent``: bytes of the
    bundles that it reads and sends; ``inputs``: the denoiser's that it takes."""
    limits = limits or Limits(())
    run = [n for n in nodes if captured.each_run(n)]
    outputs = {base_of(captured, o) for o in captured.outputs if isinstance(o, fx.Node)}
    here = {base_of(captured, n) for n in run}
    last = {base_of(captured, s): n for n in run for s in (n, *n.all_input_nodes)}
    dies: dict[fx.Node, list[fx.Node]] = {}
    for base, node in last.items():
        if base in here and base not in outputs:
            dies.setdefault(node, []).append(base)
    live = most = 0
    for node in run:
        if base_of(captured, node) is node:
            live += nbytes_of(node)
        most = max(most, live)
        live -= sum(nbytes_of(base) for base in dies.get(node, ()))
    kept = {base_of(captured, s) for n in run for s in n.all_input_nodes if _is_ahead(captured, s)}
    rows = sum(nbytes_of(n) for n in kept if n in captured.timed)
    ahead = sum(nbytes_of(n) for n in (*kept, *inputs) if n not in captured.timed)
    each = weight_bytes(captured, limits)
    return Use(
        weights=sum(each[w] for w in weights),
        mailboxes=int(limits.mailboxes(read, sent)),
        activations=limits.engines * limits.runs * most,
        ahead=ahead + min(TABLE_BYTES, _STEPS * rows),
    )


class Needs:
    """What every component of successive units would need: see :meth:`matrix`. ``owned`` are the
    units, in order."""

    def __init__(self, captured: Captured, owned: Sequence[fx.Node], limits: Limits) -> None:
        count = len(owned)
        position = {n: i for i, n in enumerate(owned)}
        sizes = weight_bytes(captured, limits)
        self.size = np.array([nbytes_of(n) for n in owned], dtype=np.float64)
        self.transient = np.zeros(count)
        #: by unit, the units whose values it reads
        self.reads: list[set[int]] = [set() for _ in owned]
        #: by unit, weights and what is kept of a generation, and what is kept of a timestep
        self.fixed: list[dict[object, int]] = [{} for _ in owned]
        self.timed: list[dict[object, int]] = [{} for _ in owned]
        self.last = np.arange(count)
        self.inputs = sum(nbytes_of(n) for n in captured.graph.nodes if n.name in captured.inputs)
        # What each node that is nobody's brings along: values of units, weights, kept values.
        values: dict[fx.Node, set[int]] = {}
        brings: dict[fx.Node, set[fx.Node]] = {}
        waiting: dict[fx.Node, int] = {}
        for node in captured.nodes:
            found = {v for s in node.all_input_nodes for v in values.get(s, ())}
            behind = {w for s in node.all_input_nodes for w in brings.get(s, ())}
            for source in node.all_input_nodes:
                if source.name in captured.weights or (
                    _is_ahead(captured, source) and captured.each_run(node)
                ):
                    behind.add(source)
            here = position.get(node)
            if here is not None:
                self.reads[here] |= found
                for item in behind:
                    if item.name in captured.weights:
                        self.fixed[here][item] = sizes[item.name]
                    else:
                        base = base_of(captured, item)
                        kind = self.timed if base in captured.timed else self.fixed
                        kind[here][base] = nbytes_of(base)
                self.transient[here] += sum(waiting.pop(s, 0) for s in node.all_input_nodes)
                found, behind = {here}, set()
            elif captured.each_run(node) and node not in captured.variant:
                own = nbytes_of(node) if base_of(captured, node) is node else 0
                waiting[node] = own + sum(waiting.pop(s, 0) for s in node.all_input_nodes)
            values[node], brings[node] = found, behind
        for here, read in enumerate(self.reads):
            for v in read:
                self.last[v] = max(self.last[v], here)
        for output in captured.outputs:
            for v in values.get(output, ()):
                self.last[v] = count

    def matrix(self, limits: Limits) -> np.ndarray:
        """[a, b]: bytes that a component of units a … b−1 needs. Values that others read, too,
        count until the last of these reads them."""
        count = len(self.size)
        need = np.zeros((count + 1, count + 1))
        fixed, timed = _Latest(count), _Latest(count)
        reader = np.arange(count)
        mail = np.zeros(count + 2)
        peak = np.zeros(count)
        for b in range(1, count + 1):
            here = b - 1
            fixed.take(here, self.fixed[here])
            timed.take(here, self.timed[here])
            for v in self.reads[here]:
                # It has to be sent to components that begin after it, up to here.
                mail[reader[v] + 1] += self.size[v]
                mail[here + 1] -= self.size[v]
                reader[v] = here
            alive = np.where(self.last[:b] >= here, self.size[:b], 0.0)
            live = np.cumsum(alive[::-1])[::-1] + self.transient[here]
            peak[:b] = np.maximum(peak[:b], live)
            leaving = np.where(self.last[:b] >= b, self.size[:b], 0.0)
            boxes = limits.mailboxes(np.cumsum(mail[:b]), np.cumsum(leaving[::-1])[::-1])
            rows = np.minimum(TABLE_BYTES, _STEPS * timed.since(b))
            runs = limits.engines * limits.runs * peak[:b]
            need[:b, b] = fixed.since(b) + rows + boxes + runs + self.inputs
        return need


class _Latest:
    """Bytes of things by the last unit that needed each."""

    def __init__(self, count: int) -> None:
        self._at = np.zeros(count)
        self._last: dict[object, int] = {}

    def take(self, here: int, items: Mapping[object, int]) -> None:
        """The unit ``here`` needs these."""
        for item, nbytes in items.items():
            before = self._last.get(item)
            if before is not None:
                self._at[before] -= nbytes
            self._at[here] += nbytes
            self._last[item] = here

    def since(self, b: int) -> np.ndarray:
        """[a]: bytes of all that units a … b−1 need."""
        return np.cumsum(self._at[:b][::-1])[::-1]


def of_module(module: torch.nn.Module) -> int:
    """Bytes of a module's weights and buffers, as they are stored."""
    weights = (*module.parameters(), *module.buffers())
    return sum(part.nbytes for w in weights for part in parts_of(w))
