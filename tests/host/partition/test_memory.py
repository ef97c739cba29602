"""What components need of memory: the estimate against what runs hold, and cuts within limits."""

from __future__ import annotations

import itertools
import re
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import arguments, cast_by_layer, gguf, transformer
from torch.utils._python_dispatch import TorchDispatchMode
from toys import Toy, tower, tower_call, toy_call

from asyncdiff import InputError, MemoryLimitError, ParallelConfig
from asyncdiff.graph.capture import Captured, capture
from asyncdiff.graph.hoist import hoist
from asyncdiff.graph.program import run_program
from asyncdiff.graph.signature import parse
from asyncdiff.partition.cost import Costs
from asyncdiff.partition.links import Links
from asyncdiff.partition.memory import Limits, Needs, in_words
from asyncdiff.partition.ownership import units
from asyncdiff.partition.partition import partition

CPU = torch.device("cpu")


def even(captured: Captured) -> Costs:
    ms = {n: 0.0 if n in captured.views else 1.0 for n in captured.nodes}
    return Costs(ms, dict.fromkeys(captured.nodes, 0), "made up")


@cache
def denoiser(which: str) -> tuple[Captured, Any]:
    torch.manual_seed(0)
    module = tower(depth=4) if which == "tower" else Toy(depth=4).double().eval()
    module.requires_grad_(False)
    call = parse(module, (), tower_call() if which == "tower" else toy_call(size=16))
    return capture(module, call), call


class Live(TorchDispatchMode):
    """The most bytes that values made meanwhile take at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        mine = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            storage = tensor.untyped_storage()
            if storage.data_ptr() in mine or storage.data_ptr() in self._known:
                continue
            self._known.add(storage.data_ptr())
            self.now += storage.nbytes()
            weakref.finalize(storage, self._gone, storage.data_ptr(), storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _gone(self, pointer: int, nbytes: int) -> None:
        self._known.discard(pointer)
        self.now -= nbytes


@pytest.mark.parametrize("which", ["toy", "tower"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_activations_are_what_a_run_holds(which: str, count: int) -> None:
    captured, call = denoiser(which)
    parts = partition(captured, count, costs=even(captured))
    for component, use in zip(parts.components, parts.memory(), strict=True):
        hoisted = hoist(parts.program(component.index, CPU))
        inputs = [call.tensors[captured.inputs[n.name]] for n in component.inputs]
        read = [
            torch.zeros(v.meta["val"].shape, dtype=v.meta["val"].dtype)
            for b in component.reads
            for v in b.values
        ]
        kept = [] if hoisted.once is None else hoisted.once(*inputs, *read)
        rows = [] if hoisted.timed is None else hoisted.timed(*inputs, *read, *kept)
        with torch.no_grad(), Live() as live:
            result = run_program(hoisted.main, [*inputs, *read, *kept, *rows], lambda *_: None)
        # Attention over three dimensions is done in steps of its own.
        most = use.activations * (1.5 if which == "tower" else 1.1)
        assert 0.9 * use.activations <= live.most <= most, component.index
        del result
        nbytes = sum(captured.weights[w].nbytes for w in component.weights)
        assert use.weights == nbytes
        assert use.mailboxes == 2 * sum(b.nbytes for b in component.reads)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("which", ["toy", "tower"])
def test_what_the_cut_counts_is_what_components_need(which: str, compressed: bool) -> None:
    """At least, since a value that others read, too, counts until the last of them has."""
    captured, _ = denoiser(which)
    owned = units(captured)
    limits = Limits((None,) * 3, slots=3, compressed=compressed)
    need = Needs(captured, owned, limits).matrix(limits)
    names = [n.name for n in owned]
    inputs = sum(t.nbytes for t in denoiser(which)[1].tensors)
    some = list(range(1, len(owned), 5))
    for starts in itertools.combinations(some, 2):
        parts = partition(captured, 3, [names[p] for p in starts])
        parts.limits = limits
        edges = [0, *starts, len(owned)]
        for use, (a, b) in zip(parts.memory(), itertools.pairwise(edges), strict=True):
            assert use.total <= need[a, b] + 1e-6
            # All inputs count for each component.
            sent = 3 * 2 * 7 * 8 * 8 if which == "tower" else 4 * 2 * 8 * 16 * 16 * 8
            assert (use.mailboxes > 0) == (a > 0 or compressed)
            assert need[a, b] <= use.total + inputs + sent, (a, b)


def test_the_cut_is_the_fastest_within_the_limits() -> None:
    captured, _ = denoiser("toy")
    owned, costs = units(captured), even(captured)
    names = [n.name for n in owned]
    free = partition(captured, 2, costs=costs, links=Links.alike(1e12))
    uses = free.memory()
    largest = max(range(2), key=lambda i: uses[i].total)
    each: list[int | None] = [None, None]
    each[largest] = int(uses[largest].total * 0.8)
    limits = Limits(tuple(each))
    made = partition(captured, 2, costs=costs, links=Links.alike(1e12), limits=limits)
    assert made.cuts != free.cuts and not limits.over(made.memory())

    need = Needs(captured, owned, limits).matrix(limits)

    def slowest(p: int) -> float:
        parts = partition(captured, 2, [names[p]], costs=costs)
        return max(c.ms for c in parts.report().components)

    fits = [p for p in range(1, len(owned)) if _fits(need, p, limits)]
    assert max(c.ms for c in made.report().components) <= min(map(slowest, fits)) + 1


def _fits(need: Any, p: int, limits: Limits) -> bool:
    sizes = need[0, p], need[p, len(need) - 1]
    return all(limit is None or n <= limit for n, limit in zip(sizes, limits.each, strict=True))


@pytest.mark.parametrize("size", ["9" * 400 + "GB", "0.5B", "1.2.3GB", float("inf"), 0, True])
def test_what_is_no_size_is_refused(size: Any) -> None:
    with pytest.raises(InputError, match="write what components may take"):
        ParallelConfig(memory=size)


def test_sizes_in_words() -> None:
    told = [in_words(n) for n in (0, 1000, 99_949, 650_000, 999_000_000, 21_580_000_000)]
    assert told == ["0.0 kB", "1.0 kB", "99.9 kB", "0.7 MB", "999.0 MB", "21.58 GB"]


def test_where_nothing_fits_the_error_tells_what_would_be_needed() -> None:
    captured, _ = denoiser("toy")
    limits = Limits((4000, 60_000))
    with pytest.raises(MemoryLimitError) as raised:
        partition(captured, 2, costs=even(captured), limits=limits)
    said = str(raised.value)
    assert re.search(r"component 0 \d+\.\d kB of 4\.0 kB, component 1 .* of 60\.0 kB\.", said)
    assert "Take more components, quantised weights" in said
    with pytest.raises(MemoryLimitError, match="free on their devices"):
        one = Limits((1000,), free=True)
        partition(captured, 1, costs=even(captured), limits=one)


@pytest.mark.parametrize("kind", ["cast", "gguf"])
def test_quantised_weights_count_as_they_are_stored(kind: str, tmp_path: Path) -> None:
    """And what a run decodes of them is among its activations."""
    plain = transformer()
    module = cast_by_layer(tmp_path) if kind == "cast" else gguf("Q8_0", tmp_path)
    uses = []
    for each in (plain, module):
        captured = capture(each, parse(each, (), arguments()))
        parts = partition(captured, 2, costs=even(captured))
        uses.append(parts.memory())
        owned, limits = units(captured), Limits((None, None))
        need = Needs(captured, owned, limits).matrix(limits)
        p = [n.name for n in owned].index((parts.cuts or ("",))[0])
        assert parts.memory()[0].total <= need[0, p] * 1.001
    full, coded = uses
    assert sum(u.weights for u in coded) < 0.7 * sum(u.weights for u in full)
    assert max(u.activations for u in coded) > max(u.activations for u in full)
