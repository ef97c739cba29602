"""What every node of a captured denoiser costs: measured on a device, or estimated without one."""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from ..graph.capture import Captured, nbytes_of, tensors_of
from ..graph.layers.quantized import plain
from ..graph.program import on_device, resolve
from ..progress import tell
from .timing import milliseconds

#: Nodes timed behind one gate: few enough that a GPU's launch queue holds them all.
_BLOCK_NODES = 128
#: Timed passes over each block, after one that warms up.
_PASSES = 3
#: Nodes that are alike, as those of layers mostly are, are timed at so many places, spread over all
#: of them. What lies between, of at least so many nodes, is only run.
_PLACES, _FOLLOWING = 5, 32
#: A GPU's rates for estimates, about half of an H200's peaks. Only ratios matter for a cut.
_FLOPS_PER_MS = {torch.float32: 2.5e10, torch.float16: 4e11, torch.bfloat16: 4e11}
_BYTES_PER_MS = 2.5e9


@dataclass(frozen=True)
class Costs:
    """Milliseconds and multiply-accumulates by node. ``source`` says where the times are from.
    ``each``: where components run on unequal devices, milliseconds by node on that of each.
    ``busy``: a device was found to be slower than others of its kind, which may pass. ``timed``:
    they go by what components took."""

    ms: dict[fx.Node, float]
    macs: dict[fx.Node, int]
    source: str
    each: tuple[dict[fx.Node, float], ...] = ()
    busy: bool = False
    timed: bool = False

    def on(self, component: int) -> dict[fx.Node, float]:
        """Milliseconds by node where a component runs."""
        return self.each[component] if self.each else self.ms


def estimate(captured: Captured) -> Costs:
    """Costs from FLOPs and bytes moved: the same on every machine, for any device (also meta)."""
    return captured.once_known("estimated costs", lambda: _estimated(captured))


def _estimated(captured: Captured) -> Costs:
    macs = count_macs(captured)
    ms = {}
    for node in captured.nodes:
        if node in captured.views:
            ms[node] = 0.0
            continue
        dtype = next((t.dtype for t in tensors_of(node)), torch.float32)
        rate = _FLOPS_PER_MS.get(dtype, _FLOPS_PER_MS[torch.float32])
        ms[node] = max(2 * macs[node] / rate, _moved(node) / _BYTES_PER_MS)
    return Costs(ms, macs, "estimated")


def fused(captured: Captured, costs: Costs) -> Costs:
    """Measured costs as they are once a compiler has fused what only moves memory.

    Matrix products, convolutions and attention keep their times, without the pass that adds a
    convolution's bias. Of all else what counts is the memory that still has to be read and written:
    a chain of such nodes reads what heavy nodes and normalisations left, and writes what they need.
    The memory's speed is the median of the large measured nodes that do nothing else.
    """
    light = {n for n in captured.nodes if n not in captured.views and not costs.macs[n]}
    readers = _readers(captured)
    # Written to memory: what a heavy node made or needs, or what a normalisation has to read twice.
    written = {
        n
        for n in captured.nodes
        if n not in captured.views
        and (n not in light or any(r not in light or _reduces(r) for r in readers[n]))
    }
    large = (n for n in light if not _reduces(n) and nbytes_of(n) > 1 << 22 and costs.ms[n] > 0)
    speed = statistics.median([_moved(n) / costs.ms[n] for n in large] or [_BYTES_PER_MS])
    ms = dict(costs.ms)
    for node in captured.nodes:
        if node in captured.views:
            continue
        size = nbytes_of(node)
        if node not in light:
            if "conv" in str(node.target) and node.args[2:3] != (None,):
                ms[node] = max(ms[node] - 2 * size / speed, ms[node] / 2)
            continue
        moved = size if node in written else 0
        for source in node.all_input_nodes:
            base = _base(captured, source)
            if base in written or base.op == "placeholder":
                moved += nbytes_of(base) * (2 if _reduces(node) else 1)
        ms[node] = min(ms[node], moved / speed)
    return Costs(ms, costs.macs, f"{costs.source}, as if fused")


def _moved(node: fx.Node) -> int:
    """Bytes that a node reads and writes."""
    return nbytes_of(node) + sum(map(nbytes_of, node.all_input_nodes))


def _readers(captured: Captured) -> dict[fx.Node, set[fx.Node]]:
    """Who reads a node's value, through views."""
    out: dict[fx.Node, set[fx.Node]] = {}
    for node in reversed(captured.nodes):
        users = [u for u in node.users if u.op == "call_function"]
        out[node] = {r for u in users for r in (out[u] if u in captured.views else {u})}
    return out


def _base(captured: Captured, node: fx.Node) -> fx.Node:
    """The node whose memory a view shows."""
    while node in captured.views:
        node = node.all_input_nodes[0]
    return node


def _reduces(node: fx.Node) -> bool:
    return any(word in str(node.target) for word in ("norm", "softmax", "mean"))


class _Untracked(contextlib.nullcontext[None]):
    """In the place of torch's tracker of modules, which hangs hooks on all modules of the process
    while it counts: a pipeline that begins in another thread is refused because of such."""

    parents = frozenset({"Global"})


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _kind(node: fx.Node) -> str:
    """What nodes have in common that do the same work: the operation, and its arguments by type,
    shape, strides and dtype."""

    def told(source: fx.Node) -> Any:
        if source.op == "get_attr":  # a graph of its own
            return source.target
        return pytree.tree_map_only(
            torch.Tensor,
            lambda t: (type(t).__name__, tuple(t.shape), t.stride(), t.dtype),
            source.meta.get("val"),
        )

    return f"{node.target} {fx.map_arg((node.args, node.kwargs), told)}"


def count_macs(captured: Captured) -> dict[fx.Node, int]:
    """Multiply-accumulates of every node, as torch's own FLOP counter counts them; of products that
    it does not know (of quantised weights), by their shapes."""
    macs = dict.fromkeys(captured.nodes, 0)
    heavy = ("conv", "linear", "mm", "matmul", "attention", "einsum")
    counted: dict[str, int] = {}
    for node in captured.nodes:
        if not any(word in str(node.target) for word in heavy):
            continue
        key = _kind(node)
        if key not in counted:
            values = {
                n: pytree.tree_map_only(torch.Tensor, _meta, n.meta.get("val"))
                for n in node.all_input_nodes
            }
            args, kwargs = resolve(node, values.__getitem__, torch.device("meta"))
            counter = FlopCounterMode(display=False)
            counter.mod_tracker = _Untracked()  # type: ignore[assignment]
            with counter:
                node.target(*args, **kwargs)  # type: ignore[operator]
            counted[key] = counter.get_total_flops() // 2 or _of_product(node, args)
        macs[node] = counted[key]
    return macs


def _of_product(node: fx.Node, args: Sequence[Any]) -> int:
    """Those of a product of its first argument, whose rows are as long as what is summed up."""
    tensors = [x for x in args if isinstance(x, torch.Tensor) and x.dim() > 0]
    if not any(word in str(node.target) for word in ("mm", "matmul")) or len(tensors) < 2:
        return 0
    made = tensors_of(node)
    return made[0].numel() * tensors[0].shape[-1] if made else 0


@torch.no_grad()
def measure(
    captured: Captured,
    tensors: Sequence[torch.Tensor],
    device: torch.device,
    bring: Callable[[Captured, str, torch.device], torch.Tensor] | None = None,
) -> Costs:
    """Run the denoiser node by node on ``device`` and time each (medians, also over nodes that are
    alike: of those a few are timed).

    ``tensors`` are the call's inputs. Weights are brought to the device block by block, by
    ``bring`` (None: they are where the denoiser is), so that a denoiser larger than the device's
    memory can be measured too.
    """
    values: dict[fx.Node, Any] = {
        node: tensors[captured.inputs[node.name]].to(device)
        for node in captured.graph.nodes
        if node.op == "placeholder" and node.name in captured.inputs
    }
    last_reader = {s: n for n in captured.nodes for s in n.all_input_nodes}
    alike = _alike(captured)
    found: dict[Hashable, list[float]] = {kind: [] for kind in alike.values()}
    chosen = _chosen(alike)
    what, count = "timing the denoiser's parts", len(captured.nodes)
    with on_device(device):
        too_long = _launch_ms(device) if device.type == "cuda" else 0.0
        start = 0
        while start < count:
            tell(what, start, count)
            block, timed = _block(captured.nodes[start:], chosen)
            start += len(block)
            values |= _bring(captured, block, device, bring or _weight)
            runs = _runs(block, values, last_reader, device)
            for run in runs:  # kernels are loaded, and chosen, in the first run
                run()
            if timed:
                passes = [milliseconds(runs, device) for _ in range(_PASSES)]
                for node, times in zip(block, zip(*passes, strict=True), strict=True):
                    if node in alike:
                        found[alike[node]].append(statistics.median(times) - too_long)
            _forget(captured, block, values, last_reader)
    tell(what, count, count)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    of_kind = {kind: max(statistics.median(times), 0.0) for kind, times in found.items()}
    ms = {node: of_kind[alike[node]] if node in alike else 0.0 for node in captured.nodes}
    return Costs(ms, count_macs(captured), f"measured on {name}")


def _alike(captured: Captured) -> dict[fx.Node, Hashable]:
    """What nodes have in common that take the same time: what they do, and what made that which
    they read, because that may still be in the cache. Views take none, and are left out."""
    kinds = {node: _kind(node) for node in captured.nodes if node not in captured.views}
    return {
        node: (kind, *(kinds.get(_base(captured, s)) for s in node.all_input_nodes))
        for node, kind in kinds.items()
    }


def _chosen(alike: Mapping[fx.Node, Hashable]) -> set[fx.Node]:
    """The nodes to be timed: of those alike a few, spread over all."""
    places: dict[Hashable, list[fx.Node]] = {}
    for node, kind in alike.items():
        places.setdefault(kind, []).append(node)
    return {
        nodes[i * (len(nodes) - 1) // (_PLACES - 1)]
        for nodes in places.values()
        for i in range(_PLACES)
    }


def _block(nodes: Sequence[fx.Node], chosen: Set[fx.Node]) -> tuple[Sequence[fx.Node], bool]:
    """The first ones, to be run behind one gate; and whether there is one to be timed."""

    def only_run(start: int) -> int:
        ahead = nodes[start : start + _BLOCK_NODES]
        return next((i for i, node in enumerate(ahead) if node in chosen), len(ahead))

    passed = only_run(0)
    if passed >= min(_FOLLOWING, len(nodes)):
        return nodes[:passed], False
    most = min(_BLOCK_NODES, len(nodes))
    end = next((i for i in range(1, most) if only_run(i) >= _FOLLOWING), most)
    return nodes[:end], True


def _weight(captured: Captured, name: str, device: torch.device) -> torch.Tensor:
    return plain(captured.weights[name]).to(device)


def _bring(
    captured: Captured,
    block: Sequence[fx.Node],
    device: torch.device,
    bring: Callable[[Captured, str, torch.device], torch.Tensor],
) -> dict[fx.Node, Any]:
    out: dict[fx.Node, Any] = {}
    for node in block:
        for source in node.all_input_nodes:
            if source.op == "placeholder" and source.name in captured.weights:
                out[source] = bring(captured, source.name, device)
            elif source.op == "get_attr":
                out[source] = captured.root.get_submodule(str(source.target))
    return out


def _runs(
    block: Sequence[fx.Node],
    values: dict[fx.Node, Any],
    last_reader: Mapping[fx.Node, fx.Node],
    device: torch.device,
) -> list[Callable[[], None]]:
    """Runs of one node each, that may be done again and again."""
    dies: dict[fx.Node, list[fx.Node]] = {}
    for node in block:
        dies.setdefault(last_reader.get(node, node), []).append(node)

    def run(node: fx.Node) -> None:
        args, kwargs = resolve(node, values.__getitem__, device)
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        # As soon as in the component: what is written again while it is still in the cache never
        # goes to memory, and large nodes take up to half longer where it does.
        for dead in dies.get(node, ()):
            del values[dead]

    return [functools.partial(run, node) for node in block]


def _forget(
    captured: Captured,
    block: Sequence[fx.Node],
    values: dict[fx.Node, Any],
    last_reader: Mapping[fx.Node, fx.Node],
) -> None:
    """Drop weights, and what nobody reads after this block."""
    mine = set(block)
    for node in list(values):
        kept = node.op == "call_function" or node.name in captured.inputs
        if not kept or last_reader.get(node) in mine:
            del values[node]


@functools.cache
def _launch_ms(device: torch.device) -> float:
    """By how much a node between two events takes longer than in the CUDA graph that it will run
    in, behind another node: about a microsecond. Components with many small nodes would seem
    slower than they are."""
    tiny = torch.zeros(1, device=device)
    add = functools.partial(tiny.add_, 1)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(_BLOCK_NODES):
            add()
    differences = []
    for _ in range(_PASSES):
        apart = statistics.median(milliseconds([add] * _BLOCK_NODES, device))
        together = statistics.median(milliseconds([graph.replay] * 8, device)) / _BLOCK_NODES
        differences.append(apart - together)
    # The least: where others use the GPU too, events are further apart.
    return max(min(differences), 0.0)
