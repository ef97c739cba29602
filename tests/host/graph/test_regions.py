"""Repeated modules compiled by themselves, each kind once for all components."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
from families import FAMILIES, STEPS
from tiny_pipelines import draw
from torch import fx, nn
from torch._dynamo.utils import counters
from toys import Block, tower, tower_call

import asyncdiff
from asyncdiff import AsyncDenoiser
from asyncdiff.errors import InputError
from asyncdiff.graph.capture import Captured, capture
from asyncdiff.graph.compiled import compile as compiling
from asyncdiff.graph.compiled.compile import Pieces
from asyncdiff.graph.compiled.regions import repeated
from asyncdiff.graph.compiled.structure import structure
from asyncdiff.graph.program import Emit, run_program
from asyncdiff.graph.signature import parse
from asyncdiff.partition.partition import partition

TIMES = [torch.tensor(900 - 100 * k) for k in range(3)]
CPU = torch.device("cpu")
HALVES = [
    ["enter", *(f"blocks.{k}" for k in range(3))],
    [f"blocks.{k}" for k in (3, 4, 5)] + ["leave"],
]


def captured(module: nn.Module, call: dict[str, torch.Tensor] | None = None) -> Captured:
    return capture(module, parse(module, (), call or tower_call()))


def spread(module: nn.Module, **settings: Any) -> AsyncDenoiser:
    return AsyncDenoiser(module, devices=["cpu"] * 2, **{"split": "estimate", **settings})


def run(denoiser: AsyncDenoiser) -> torch.Tensor:
    call = tower_call()
    latents = call["hidden_states"]
    with denoiser.generation(torch.stack(TIMES)):
        for t in TIMES:
            latents = latents - 0.1 * denoiser(
                latents, t, encoder_hidden_states=call["encoder_hidden_states"]
            )
    return latents


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test gets what was compiled in another one."""
    monkeypatch.setattr(compiling, "_known", compiling._Known())


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """What inductor is given; it is run as it is."""
    given: list[fx.GraphModule] = []

    def take(piece: fx.GraphModule, arguments: list[Any]) -> Callable[..., Any]:
        given.append(piece)
        return piece.forward

    monkeypatch.setattr(torch._inductor, "compile", take)
    return given


def blocks_in(pieces: list[fx.GraphModule]) -> list[int]:
    """How many blocks there are in each."""
    gelu = torch.ops.aten.gelu.default
    return [len(p.graph.find_nodes(op="call_function", target=gelu)) for p in pieces]


# ---- which modules are regions -------------------------------------------------------------------


def test_equal_blocks_are_regions() -> None:
    regions = repeated(captured(tower()))
    assert list(regions) == [f"blocks.{k}" for k in range(6)]
    assert len(set(regions.values())) == 1


def test_blocks_of_other_shapes_and_constants_are_other_regions() -> None:
    alone = repeated(captured(tower(widths=[8, 8, 16, 16, 12])))
    assert list(alone) == ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]
    alone = repeated(captured(tower(eps=[1e-5, 1e-5, 1e-6, 1e-5])))
    assert list(alone) == ["blocks.0", "blocks.1", "blocks.3"]


class Stages(nn.Module):
    """Stages of blocks one after another, each stage the same."""

    def __init__(self, stages: int, depth: int, widths: tuple[int, ...] = (8,)) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Stage(depth, widths) for _ in range(stages))

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        time = timestep.to(sample.dtype).expand(1, 2)
        for stage in self.stages:
            sample = stage(sample, time, encoder_hidden_states)
        return sample


class Stage(nn.Module):
    def __init__(self, depth: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(widths[k % len(widths)]) for k in range(depth))

    def forward(self, x: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            width = block.norm.weight.shape[0]
            x = torch.tanh(block(torch.cat([x, x], dim=-1)[..., :width], time, text)[0])
        return x[..., :8].contiguous()


def stages(*args: Any) -> dict[str, int]:
    call = tower_call()
    call["sample"] = call.pop("hidden_states")[..., :4].repeat(1, 1, 2)
    return repeated(captured(Stages(*args).double().eval().requires_grad_(False), call))


def test_the_largest_repeated_module_is_the_region_unless_it_repeats_one_itself() -> None:
    assert list(stages(2, 3)) == [f"stages.{s}.blocks.{b}" for s in (0, 1) for b in (0, 1, 2)]
    # A stage of two unlike blocks is one region.
    assert list(stages(2, 2, (8, 12))) == ["stages.0", "stages.1"]


def test_small_modules_are_no_regions() -> None:
    module = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(4)))

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = module

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.layers(sample) + timestep

    call = {"sample": torch.ones(2, 4), "timestep": torch.tensor(1.0)}
    assert not repeated(captured(Small().requires_grad_(False), call))


def made(*operations: tuple[Any, ...], constant: Any = 2.0) -> str:
    """The digest of a few operations on x and y."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    nodes = [graph.call_function(torch.ops.aten.add.Tensor, (x, y), {"alpha": constant})]
    nodes.append(graph.call_function(torch.ops.aten.cat.default, ([nodes[0], x], 0)))
    for target, *args in operations:
        nodes.append(graph.call_function(target, tuple(nodes if a is nodes else a for a in args)))
    return structure(nodes, nodes[-1:], lambda node: "").digest


def test_structures_are_equal_where_only_names_are_not() -> None:
    assert made() == made()
    assert made() != made(constant=2) != made(constant=True)  # an integer is no float
    assert made(constant=torch.float32) != made(constant=torch.float64)
    assert made(constant=slice(0, 1)) == made(constant=slice(0, 1)) != made(constant=slice(0, 2))
    assert made(constant=object()) != made(constant=object())
    assert made((torch.relu, 1)) != made((torch.tanh, 1))


# ---- what is compiled ----------------------------------------------------------------------------


def test_a_block_is_compiled_once_for_all_components(pieces: list[fx.GraphModule]) -> None:
    plain = spread(tower(), split=HALVES)
    want = run(plain)
    told: list[tuple[str, int, int]] = []
    denoiser = spread(
        tower(), split=HALVES, compile="regions", progress=lambda *said: told.append(said)
    )
    assert torch.equal(run(denoiser), want)
    assert denoiser.report().compiled
    assert blocks_in(pieces).count(1) == 1 and sum(blocks_in(pieces)) == 1
    total = {what: of for what, _, of in told if what.startswith("compiling")}
    assert min(total.values()) >= 3 and len(pieces) < sum(total.values()) / 2
    count = len(pieces)
    run(again := spread(tower(), split=HALVES, compile="regions"))  # another of the same kind
    assert len(pieces) == count
    for each in (plain, denoiser, again):
        each.close()


def test_whole_components_are_what_is_compiled_otherwise(pieces: list[fx.GraphModule]) -> None:
    denoiser = spread(tower(), split=HALVES, compile="whole")
    run(denoiser)
    assert sorted(blocks_in(pieces)) == [3, 3]
    denoiser.close()


def test_ranks_that_run_the_same_component_share_what_is_compiled(
    pieces: list[fx.GraphModule],
) -> None:
    denoiser = AsyncDenoiser(tower(), devices=["cpu"] * 3, split=HALVES, stride=2, compile="whole")
    run(denoiser)
    assert sorted(blocks_in(pieces)) == [3, 3]  # and not 3 for the copy, too
    denoiser.close()


def test_a_push_in_the_middle_of_a_region_leaves_early(pieces: list[fx.GraphModule]) -> None:
    """Component 1 has the block's half; what it needs is pushed before the other half is done."""
    module, call = tower(depth=4), tower_call()
    graph = captured(module)
    gelu = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default)
    parts = partition(graph, 2, [gelu[2].name])
    program = parts.program(0, CPU)
    given = parse(module, (), call).tensors
    inputs = [given[graph.inputs[n.name]] for n in parts.components[0].inputs]

    def pushed(what: fx.GraphModule) -> list[Any]:
        order: list[Any] = []
        for name, piece in what.named_children():
            if name.startswith("piece"):
                piece.register_forward_hook(lambda *_, name=name: order.append(name))
        with torch.no_grad():
            run_program(what, inputs, lambda *value: order.append(value))
        return order

    want = pushed(program)
    assert len(want) >= 2  # the residual, and what the second half makes of it
    order = pushed(Pieces(program, inputs, repeated(graph), lambda *_: None).compile().program)
    values = [x for x in order if isinstance(x, tuple)]
    assert isinstance(order[-1], tuple)
    for got, expected in zip(values, want, strict=True):
        assert got[:2] == expected[:2] and torch.equal(got[2], expected[2])
    first = next(k for k, x in enumerate(order) if isinstance(x, tuple))
    assert any(isinstance(x, str) for x in order[first:])
    assert blocks_in(pieces).count(1) >= 1


def test_one_region_that_inductor_cannot_take_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []

    def take(piece: fx.GraphModule, arguments: list[Any]) -> Callable[..., Any]:
        asked.extend(blocks_in([piece]))
        if asked[-1]:
            for node in piece.graph.find_nodes(op="output"):
                node.args = ((),)
            piece.recompile()  # as inductor may have rewritten it by then
            raise RuntimeError("no such lowering")
        return piece.forward

    plain = AsyncDenoiser(tower(), devices=["cpu"], components=1)
    want = run(plain)
    monkeypatch.setattr(torch._inductor, "compile", take)
    with caplog.at_level(logging.WARNING, "asyncdiff"):
        denoiser = AsyncDenoiser(tower(), devices=["cpu"], components=1, compile="regions")
        got = run(denoiser)
    assert torch.equal(got, want)
    assert denoiser.report().compiled
    said = [r.getMessage() for r in caplog.records if "uncompiled" in r.getMessage()]
    assert said == [
        "a part of rank 0 runs uncompiled, which is slower: RuntimeError: no such lowering"
    ]
    assert asked.count(1) == 1  # not tried again for every block
    plain.close()
    denoiser.close()


def test_weights_that_are_replaced_need_no_compiling(pieces: list[fx.GraphModule]) -> None:
    module = tower()
    denoiser = spread(module, compile="regions")
    before = run(denoiser)
    count, engine = len(pieces), denoiser._engine
    for block in module.blocks:
        block.wide.weight = nn.Parameter(2 * block.wide.weight, requires_grad=False)
        block.narrow.bias.add_(1)
    plain = spread(module)
    want = run(plain)
    assert torch.equal(run(denoiser), want) and not torch.equal(want, before)
    assert len(pieces) == count and engine is denoiser._engine
    plain.close()
    denoiser.close()


@pytest.mark.slow
def test_what_inductor_makes_of_regions_is_near_the_plain_ones() -> None:
    """Views that cross borders, strides and values that are kept, through inductor itself."""
    made: list[int] = []
    plain = spread(tower(), split=HALVES)
    want = run(plain)
    with pytest.MonkeyPatch.context() as patch:
        real = torch._inductor.compile
        patch.setattr(torch._inductor, "compile", lambda *given: made.append(1) or real(*given))
        denoiser = spread(tower(), split=HALVES, compile="regions")
        torch.testing.assert_close(run(denoiser), want, rtol=1e-9, atol=1e-9)
    assert len(made) == 4
    weights = [weakref.ref(p) for p in denoiser.module.parameters()]
    plain.close()
    denoiser.close()
    del denoiser, plain
    gc.collect()
    assert not any(weight() is not None for weight in weights)  # code holds no weights


def test_equal_regions_are_computed_by_the_same_code(pieces: list[fx.GraphModule]) -> None:
    denoiser = spread(tower(), split=HALVES, compile="regions")
    run(denoiser)
    calls = [
        piece.call
        for worker in denoiser._engine.workers
        for name, piece in worker.program.main.named_children()
        if name.startswith("piece") and hasattr(piece, "call")
    ]
    block = next(p for p in pieces if blocks_in([p]) == [1])
    assert sum(call.__self__ is block for call in calls) == 6
    denoiser.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families_in_regions_are_what_they_are_in_one_piece(
    name: str, pieces: list[fx.GraphModule]
) -> None:
    drawn = []
    for compile in (False, "regions"):
        pipe, call = FAMILIES[name]()
        options = {"components": 2, "warmup": 1, "split": "estimate", "compile": compile}
        handle = asyncdiff.parallelize(pipe, devices=["cpu"] * 2, **options)
        made = draw(pipe, {"num_inference_steps": STEPS} | call)
        drawn.append(torch.as_tensor(made[0] if isinstance(made, (list, tuple)) else made))
        handle.restore()
    assert torch.equal(*drawn) and pieces


@pytest.mark.slow
@pytest.mark.parametrize("kind", quantized.KINDS)
def test_quantised_weights_are_inputs_of_regions(
    kind: str, tmp_path: Path, pieces: list[fx.GraphModule]
) -> None:
    module = quantized.KINDS[kind][0](tmp_path)
    call = quantized.arguments()
    drawn = []
    for compile in (False, "regions"):
        denoiser = spread(module, compile=compile)
        with denoiser.generation(call["timestep"]):
            drawn.append(denoiser(**call, return_dict=False)[0])
        denoiser.close()
    assert torch.equal(*drawn) and pieces
    assert not any(piece.graph.find_nodes(op="get_attr") for piece in pieces)


@pytest.mark.slow
def test_what_was_compiled_is_found_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """By another process; here by one that has forgotten everything."""
    found = []
    for _ in range(2):
        monkeypatch.setattr(compiling, "_known", compiling._Known())
        counters.clear()
        denoiser = spread(tower(depth=2), compile="regions")
        run(denoiser)
        denoiser.close()
        found.append(dict(counters["inductor"]))
    assert found[1]["fxgraph_cache_hit"] >= 2
    assert not any("bypass" in name or "miss" in name for name in found[1])


def written() -> fx.GraphModule:
    """A program that writes to a view of its input after a push."""
    aten = torch.ops.aten
    root = nn.Module()
    root.add_module("emit", Emit())
    graph = fx.Graph()
    x = graph.placeholder("x")
    view = graph.call_function(aten.t.default, (x,))
    more = graph.call_function(aten.add.Tensor, (view, 1.0))
    graph.call_module("emit", (0, 0, more))
    graph.call_function(aten.mul_.Tensor, (view, 3.0))
    graph.output([graph.call_function(aten.add.Tensor, (x, x))])
    return fx.GraphModule(root, graph)


@pytest.mark.slow
def test_writes_to_views_of_inputs_are_seen_by_later_pieces() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    program = written()
    want = run_program(program, [mine := x.clone()], None)
    compiled = Pieces(program, [x.clone()], {}, lambda *_: None).compile()
    assert compiled.pieces == 2 and not compiled.refused
    got = run_program(compiled.program, [other := x.clone()], None)
    assert torch.equal(got[0], want[0]) and torch.equal(mine, other)


@pytest.mark.slow
def test_code_for_one_tensor_given_twice_is_right_for_two() -> None:
    """Two blocks may share a weight where others have two; weights may ask for gradients."""
    root = nn.Module()
    root.add_module("emit", Emit())
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    twice = graph.call_function(torch.ops.aten.mul.Tensor, (x, 2.0))
    graph.output([graph.call_function(torch.ops.aten.add.Tensor, (twice, y))])
    program = fx.GraphModule(root, graph)
    program.add_module("emit", root.emit)
    a, b = torch.ones(3, requires_grad=True), torch.full((3,), 5.0)
    first = Pieces(program, [a, a], {}, lambda *_: None).compile()
    second = Pieces(program, [b, a], {}, lambda *_: None).compile()
    assert first.program.piece_0.call is second.program.piece_0.call
    with torch.no_grad():
        assert torch.equal(first.program(a, a)[0], torch.full((3,), 3.0))
        assert torch.equal(second.program(b, a)[0], torch.full((3,), 11.0))


def test_settings_are_checked() -> None:
    with pytest.raises(InputError, match="write 'regions', 'whole', True or False"):
        spread(tower(), compile="blocks")
