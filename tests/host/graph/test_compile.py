"""Components compiled by inductor: the same results, pushes as early as before."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from toys import toy, toy_call

from asyncdiff import AsyncDenoiser
from asyncdiff import spread as where
from asyncdiff.graph.capture import capture, nbytes_of
from asyncdiff.graph.compiled import compile as compiling
from asyncdiff.graph.compiled.compile import Pieces, pays
from asyncdiff.graph.program import run_program
from asyncdiff.graph.signature import parse
from asyncdiff.graph.weights import Weights
from asyncdiff.partition.cost import Costs, count_macs, fused
from asyncdiff.partition.ownership import units
from asyncdiff.partition.partition import partition
from asyncdiff.progress import bar
from asyncdiff.runtime.devices import Place
from asyncdiff.runtime.engine_cache import EngineCache

SPLIT = [["enter", "down"], ["mix", "up", "leave"]]
TIMES = [torch.tensor(900 - 100 * k) for k in range(4)]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test gets what was compiled in another one."""
    monkeypatch.setattr(compiling, "_known", compiling._Known())


def run(denoiser: AsyncDenoiser) -> torch.Tensor:
    call = toy_call()
    latents = call["sample"]
    with denoiser.generation(torch.stack(TIMES)):
        for t in TIMES:
            (noise,) = denoiser(latents, t, encoder_hidden_states=call["encoder_hidden_states"])
            latents = latents - 0.1 * noise
    return latents


def spread(**settings: Any) -> AsyncDenoiser:
    return AsyncDenoiser(toy(), devices=["cpu"] * 2, split=SPLIT, **settings)


def test_the_result_is_that_of_the_plain_components() -> None:
    plain = spread()
    want = run(plain)
    seen: list[tuple[str, int, int]] = []
    compiled = spread(compile=True, progress=lambda *told: seen.append(told))
    torch.testing.assert_close(run(compiled), want, rtol=1e-9, atol=1e-9)
    report = compiled.report()
    assert report.compiled and report.compile_s > 0 and report.prepare_s > report.compile_s
    assert not plain.report().compiled
    # Component 0 pushes three values, each after a segment of its own; component 1 none.
    seen = [told for told in seen if told[0].startswith("compiling")]
    assert seen == [("compiling rank 0", i, 3) for i in (1, 2, 3)] + [("compiling rank 1", 1, 1)]
    plain.close()
    compiled.close()


@pytest.fixture
def segments(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """What inductor is given; it is run as it is."""
    given: list[fx.GraphModule] = []

    def take(segment: fx.GraphModule, arguments: list[Any]) -> Callable[..., Any]:
        assert len(arguments) == len(segment.graph.find_nodes(op="placeholder"))
        given.append(segment)
        return segment

    monkeypatch.setattr(torch._inductor, "compile", take)
    return given


def test_values_are_pushed_before_what_follows_them(segments: list[fx.GraphModule]) -> None:
    module, kwargs = toy(), toy_call()
    captured = capture(module, call := parse(module, (), kwargs))
    parts = partition(captured, 2, SPLIT)
    program = parts.program(0, torch.device("cpu"))
    inputs = [call.tensors[captured.inputs[n.name]] for n in parts.components[0].inputs]
    order: list[Any] = []

    def trace(target: int, index: int, value: torch.Tensor) -> None:
        order.append((target, index, value))

    with torch.no_grad():
        run_program(program, inputs, trace)
    want, order = order, []
    compiled = Pieces(program, inputs, {}, lambda done, total: None).compile().program
    order.clear()
    for name, segment in compiled.named_children():
        if name.startswith("piece"):
            segment.register_forward_hook(lambda *_, name=name: order.append(int(name[6:])))
    with torch.no_grad():
        run_program(compiled, inputs, trace)
    numbers = [x for x in order if isinstance(x, int)]
    pushed = [x for x in order if isinstance(x, tuple)]
    assert numbers == list(range(len(want))) and len(want) == 3
    assert len(segments) == 2  # two of them are the same, with other weights
    assert [isinstance(x, int) for x in order] == [True, False] * 3
    for (t, i, value), (target, index, expected) in zip(pushed, want, strict=True):
        assert (t, i) == (target, index)
        torch.testing.assert_close(value, expected, rtol=0, atol=0)


def test_every_computation_is_in_one_segment(segments: list[fx.GraphModule]) -> None:
    module, kwargs = toy(), toy_call()
    captured = capture(module, call := parse(module, (), kwargs))
    parts = partition(captured, 1, "estimate")
    program = parts.program(0, torch.device("cpu"))
    inputs = [call.tensors[captured.inputs[n.name]] for n in parts.components[0].inputs]
    compiled = Pieces(program, inputs, {}, lambda done, total: None).compile().program
    (segment,) = segments
    assert (
        len(segment.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)) == 3
    )
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(*inputs)[0], module(**kwargs)[0], rtol=1e-12, atol=1e-12
        )


def test_what_inductor_cannot_take_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    want = run(spread())

    def refuse(*_: Any) -> None:
        raise RuntimeError("no such lowering")

    monkeypatch.setattr(torch._inductor, "compile", refuse)
    with caplog.at_level(logging.WARNING, "asyncdiff"):
        denoiser = spread(compile=True)
        got = run(denoiser)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert not denoiser.report().compiled
    assert "rank 0 runs uncompiled, which is slower: RuntimeError: no such lowering" in caplog.text
    denoiser.close()


def test_small_denoisers_and_cpus_are_not_compiled_by_default() -> None:
    assert not pays(toy(), [torch.device("cpu")])
    denoiser = spread()
    assert not denoiser.config.compile
    denoiser.close()


def test_fused_costs_leave_out_what_need_not_be_moved() -> None:
    module, kwargs = toy(), toy_call()
    captured = capture(module, parse(module, (), kwargs))
    macs = count_macs(captured)
    before = Costs({n: 0.0 if n in captured.views else 1.0 for n in captured.nodes}, macs, "told")
    after = fused(captured, before)
    assert after.source == "told, as if fused" and after.macs == macs
    for node in captured.nodes:
        assert 0 <= after.ms[node] <= before.ms[node]
        if "linear" in str(node.target):
            assert after.ms[node] == 1  # a product stays what it is
        if "conv2d" in str(node.target):
            assert 0.5 <= after.ms[node] < 1  # the pass that adds the bias is gone

    def only(word: str) -> list[fx.Node]:
        return [n for n in units(captured) if word in str(n.target)]

    # conv → add → relu → next conv: the addition reads (its result is never written), the ReLU
    # writes (what it reads is not in memory).
    speed = 2.5e9
    relu = only("relu")[0]
    add = relu.all_input_nodes[0]
    assert after.ms[relu] * speed == pytest.approx(nbytes_of(relu))
    assert after.ms[add] * speed == pytest.approx(nbytes_of(add.all_input_nodes[0]))


def test_channels_last_is_undone() -> None:
    module = toy()
    denoiser = AsyncDenoiser(module, devices=["cpu"] * 2, split=SPLIT)
    before = {n: p.clone() for n, p in module.named_parameters()}
    denoiser._weights.channels_last()
    assert module.up[0].weight.is_contiguous(memory_format=torch.channels_last)
    denoiser.prepare(**toy_call())
    want = run(spread())
    torch.testing.assert_close(run(denoiser), want, rtol=1e-12, atol=1e-12)
    denoiser.close()
    for name, parameter in module.named_parameters():
        assert parameter.is_contiguous()
        assert torch.equal(parameter, before[name])


def test_weights_go_back_after_half_of_them_were_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host may have no memory for all, and the device none when they come back."""
    module = toy()
    weights = Weights(module)
    weights.home = torch.device("cuda", 0)
    monkeypatch.setattr("asyncdiff.graph.weights.has_room", lambda *_: False)
    moves: list[str] = []

    def to(moved: torch.nn.Module, where: torch.device | str) -> None:
        moves.append(str(where))
        if len(moves) in (1, 2):
            raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.nn.Module, "to", to)
    with pytest.raises(RuntimeError):
        weights.offload()
    with pytest.raises(RuntimeError):
        weights.restore()
    assert moves == ["cpu", "cuda:0", "cpu"]  # at least all of it in one place
    weights.restore()
    weights.restore()
    assert moves[3:] == ["cuda:0"]


def test_a_constructor_that_raises_leaves_the_module_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = toy()
    gpus = [Place.here(torch.device("cuda", i)) for i in range(2)]
    monkeypatch.setattr(where, "places_of", lambda config, team: gpus)
    seen = []

    def raises(cache: EngineCache, call: Any, **options: Any) -> None:
        seen.append(module.up[0].weight.is_contiguous())
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(EngineCache, "get", raises)
    monkeypatch.setattr(where, "check_devices", lambda *_: None)
    with pytest.raises(torch.OutOfMemoryError):
        AsyncDenoiser(module, example_kwargs=toy_call(), devices=["cuda:0", "cuda:1"], compile=True)
    assert seen == [False]  # channels last, while it was prepared
    assert all(p.is_contiguous() for p in module.parameters())


def test_progress_without_a_terminal_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with bar(None) as progress:
        progress("compiling", 1, 2)
    assert capsys.readouterr() == ("", "")
