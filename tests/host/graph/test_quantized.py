"""Denoisers whose weights are quantised, cast for each call, or of several dtypes: the same as by
themselves, and held by components as they are."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
from tiny_pipelines import draw
from torch import fx
from torch._higher_order_ops.out_dtype import out_dtype
from toys import toy, toy_call

import asyncdiff
from asyncdiff import AsyncDenoiser, InputError
from asyncdiff.graph.capture import capture
from asyncdiff.graph.layers.products import fill_rows
from asyncdiff.graph.layers.quantized import move, parts_of
from asyncdiff.graph.signature import parse
from asyncdiff.partition.cost import Costs, count_macs
from asyncdiff.partition.partition import partition
from asyncdiff.processes.agreement import of_program

TIMES = torch.tensor([0.5, 0.25], dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Packages say much about what they were built without."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def held(denoiser: AsyncDenoiser) -> list[int]:
    """Bytes that each component holds."""
    engine: Any = denoiser._engine
    programs = [worker.program.main for worker in engine.workers]
    return [sum(b.numel() * b.element_size() for b in p.buffers()) for p in programs]


#: Those that take longest to be exported, and are alike.
_SLOW = ("torchao int8", "torchao int8 dynamic", "torchao float8")
_SLOW += ("GGUF Q4_0", "GGUF Q4_K", "GGUF BF16")


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow if k in _SLOW else ()) for k in quantized.KINDS]
)
def test_is_the_same_and_held_as_it_is(kind: str, tmp_path: Path) -> None:
    make, a_weight = quantized.KINDS[kind]
    module, call = make(tmp_path), quantized.arguments()
    denoiser = AsyncDenoiser(module, (), call, components=2, warmup=2, split="estimate")
    with torch.no_grad():
        want = module(**call)[0]  # only now: it was prepared as it was loaded
    with contextlib.closing(denoiser):
        with denoiser.generation(TIMES):
            assert torch.equal(denoiser(**call)[0], want)
        captured, layer = denoiser.partition.captured, "transformer_blocks.0.ff.net.2"
        of_layer = [
            w
            for name, w in captured.weights.items()
            if layer in captured.names[name] and "bias" not in captured.names[name]
        ]
        stored = sum(w.numel() * w.element_size() for w in of_layer)
        if kind != "bitsandbytes int8":  # whose codes are no weight of the layer
            # In 4 bits of bitsandbytes with tables of its own.
            assert stored == pytest.approx(64 * 256 * a_weight, rel=0.2)
        # What is computed is the same, whatever weights are; products of integers have 17 rows at
        # least.
        filled = 4773888 if kind == "torchao int8 dynamic" else 2670592
        assert sum(count_macs(captured).values()) == filled
        # As much as the denoiser itself has, and no copy of it decoded.
        plainly = 2 * sum(p.numel() for p in quantized.transformer().parameters())
        assert sum(held(denoiser)) < plainly * {"mixed dtypes": 1.4, "GGUF BF16": 1.1}.get(
            kind, 0.9
        )
    with torch.no_grad():
        assert torch.equal(module(**call)[0], want)


def test_a_pipeline_of_quantised_weights(tmp_path: Path) -> None:
    pipe, call = quantized.pipeline(quantized.gguf("Q8_0", tmp_path))
    want = draw(pipe, call)
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, warmup=3, split="estimate"):
        assert torch.equal(draw(pipe, call), want)
        pipe.to(torch.bfloat16)  # what it computes in: nothing is to be done
        pipe.transformer.bfloat16()
        with pytest.raises(InputError, match=r"spread over its ranks in torch\.bfloat16"):
            pipe.to(torch.float16)
    assert torch.equal(draw(pipe, call), want)


def test_a_pipeline_that_casts_by_layer(tmp_path: Path) -> None:
    """Its own weights stay as they are stored, and may be written to."""
    pipe, call = quantized.pipeline(quantized.cast_by_layer(tmp_path))
    stored = {n: p.dtype for n, p in pipe.transformer.named_parameters()}
    want = draw(pipe, call)
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, warmup=3, split="estimate") as handle:
        assert torch.equal(draw(pipe, call), want)
        assert {n: p.dtype for n, p in pipe.transformer.named_parameters()} == stored
        dtypes = {w.dtype for w in handle.partition.captured.weights.values()}
        assert dtypes == {torch.float8_e4m3fn, torch.bfloat16}
        pipe.to(torch.bfloat16)
        layer = pipe.transformer.transformer_blocks[0].ff.net[2]
        layer.weight.data.copy_(torch.zeros_like(layer.weight, dtype=torch.bfloat16))
        got = draw(pipe, call)
    assert not torch.equal(got, want) and torch.equal(draw(pipe, call), got)


def test_codes_that_are_written_to(tmp_path: Path) -> None:
    module, call = quantized.torchao("float8", tmp_path), quantized.arguments()
    denoiser = AsyncDenoiser(module, (), call, components=2, warmup=2, split="estimate")
    with contextlib.closing(denoiser):
        engine = denoiser._engine
        module.transformer_blocks[0].ff.net[2].weight.qdata.zero_()
        with denoiser.generation(TIMES):
            got = denoiser(**call)[0]
        assert denoiser._engine is engine  # nothing was prepared anew
    with torch.no_grad():
        assert torch.equal(got, module(**call)[0])


class _Decodes(torch.nn.Module):
    """Layers whose weights are cast in each call."""

    def __init__(self) -> None:
        super().__init__()
        weights = (torch.nn.Parameter(torch.ones(4, 4).half(), False) for _ in range(4))
        self.weights = torch.nn.ParameterList(weights)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            sample = torch.nn.functional.linear(sample, weight.float()) + timestep
        return sample


def test_the_cut_counts_decoding() -> None:
    """What a run computes of weights alone is a cost of whoever needs it."""
    module = _Decodes()
    call = parse(module, (torch.ones(2, 4), torch.tensor(1.0)), {})
    captured = capture(module, call)
    decoding = [n for n in captured.nodes if n not in captured.variant]
    assert len(decoding) == 4
    ms = dict.fromkeys(captured.nodes, 0.1) | dict.fromkeys(decoding, 1.0)
    parts = partition(captured, 2, costs=Costs(ms, dict.fromkeys(ms, 0), "made up"))
    assert [len(c.weights) for c in parts.components] == [2, 2]
    ms[decoding[0]] = 9.0
    parts = partition(captured, 2, costs=Costs(ms, dict.fromkeys(ms, 0), "made up"))
    assert [len(c.weights) for c in parts.components] == [1, 3]


def test_bitsandbytes_that_no_graph_can_hold() -> None:
    int8 = quantized.bitsandbytes("int8")
    int8.transformer_blocks[0].ff.net[2].state.threshold = 6.0
    pipe, _ = quantized.pipeline(int8)
    with pytest.raises(InputError, match=r"llm_int8_threshold=0\.0"):
        asyncdiff.parallelize(pipe, devices=["cpu"] * 2)
    nf4 = quantized.bitsandbytes("nf4")
    nf4.transformer_blocks[0].ff.net[2].support_avx512bf16_for_cpu = True
    with pytest.raises(InputError, match="4-bit on a CPU"):
        asyncdiff.parallelize(quantized.pipeline(nf4)[0], devices=["cpu"] * 2)


class _Opaque(torch.Tensor):
    """A wrapper around codes that computes where nobody looks."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor) -> _Opaque:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=codes.dtype)

    def __init__(self, codes: torch.Tensor) -> None:
        self.codes = codes

    def __tensor_flatten__(self) -> Any:
        return ["codes"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, *_: Any) -> _Opaque:
        return cls(inner["codes"])

    def __repr__(self) -> str:  # type: ignore[override]
        return "_Opaque"

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def open_up(x: Any) -> Any:
            return x.codes if isinstance(x, _Opaque) else x

        args, kwargs = torch.utils._pytree.tree_map(open_up, (args, kwargs or {}))
        out = function(*args, **kwargs)
        return _Opaque(out) if function is torch.ops.aten.detach.default else out


def test_a_wrapper_without_functions_of_its_own() -> None:
    module = toy()
    weight = module.mix.weight.detach()
    module.mix.weight = torch.nn.Parameter(_Opaque(weight), requires_grad=False)
    call = toy_call()
    denoiser = AsyncDenoiser(module, (), call, components=2, split="estimate")
    with contextlib.closing(denoiser), denoiser.generation([900, 500]):
        torch.testing.assert_close(denoiser(**call)[0], module(**call)[0])


class _Coded(_Opaque):
    """A weight of codes that are integers, in a wrapper of their own. Its linear layer decodes an
    input that is no plain tensor, as optimum-quanto's does."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float64)

    @staticmethod
    def __tensor_unflatten__(inner: Any, *_: Any) -> _Coded:
        return _Coded(inner["codes"])

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.nn.functional.linear:
            x, weight, *bias = args
            x = x if type(x) is torch.Tensor else x.dequantize()
            decoded = weight.codes.codes.double() / 256
            return torch.nn.functional.linear(x, decoded, *bias, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes.detach())
        return super().__torch_dispatch__(function, types, args, kwargs)


def test_integers_within_a_weight_that_asks_for_its_gradient() -> None:
    module, call = toy(), toy_call()
    codes = torch.arange(module.mix.weight.numel(), dtype=torch.uint8)
    codes = codes.view_as(module.mix.weight)
    module.mix.weight = torch.nn.Parameter(_Coded(_Opaque(codes)))
    denoiser = AsyncDenoiser(module, components=2, warmup=2, split="estimate")
    with torch.no_grad(), contextlib.closing(denoiser), denoiser.generation([900, 500]):
        assert torch.equal(denoiser(**call)[0], module(**call)[0])
    assert module.mix.weight.requires_grad


def test_a_checkpoint_of_quantised_weights(tmp_path: Path) -> None:
    module = quantized.torchao("int8", tmp_path)
    with pytest.raises(InputError, match="leave checkpoint out"):
        AsyncDenoiser(module, checkpoint=tmp_path)


def test_what_a_wrapper_is_made_of(tmp_path: Path) -> None:
    """Its bytes, and the values that processes compare, are those of codes and scales."""
    module = quantized.torchao("float8", tmp_path)
    weight = module.transformer_blocks[0].ff.net[2].weight
    assert sum(part.nbytes for part in parts_of(weight)) < 0.6 * weight.nbytes
    before = of_program(module, None)
    weight.scale.mul_(2)
    after = of_program(module, None)
    assert [n for n in before if before[n] != after[n]] == ["the values of the denoiser's weights"]


@pytest.mark.slow
def test_every_type_of_gguf() -> None:
    """One layer of each that diffusers reads."""
    package = pytest.importorskip("gguf", reason="gguf is not installed")
    from diffusers.quantizers.gguf import utils

    class Every(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator, layers = torch.Generator().manual_seed(0), []
            for kind in utils.SUPPORTED_GGUF_QUANT_TYPES:
                block, size = package.GGML_QUANT_SIZES[kind]
                # Small bytes, so that scales among them are finite.
                codes = torch.randint(0, 48, (4, 256 // block * size), generator=generator)
                layer = utils.GGUFLinear(256, 4, compute_dtype=torch.float32)
                layer.weight = utils.GGUFParameter(codes.to(torch.uint8), quant_type=kind)
                layers.append(layer)
            self.layers = torch.nn.ModuleList(layers)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return torch.stack([layer(sample * timestep) for layer in self.layers])

    module, call = Every().eval(), (torch.ones(2, 256), torch.tensor(0.5))
    want = module(*call)
    assert len(want) > 10 and want.isfinite().all()
    denoiser = AsyncDenoiser(module, call, components=2, split="estimate")
    with contextlib.closing(denoiser), denoiser.generation([0.5]):
        assert torch.equal(denoiser(*call), want)
        captured = denoiser.partition.captured
        names = [n for n, name in captured.names.items() if name.endswith(".weight")]
        assert len(names) == len(want)
        assert {captured.weights[n].dtype for n in names} == {torch.uint8}


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 17])
def test_products_of_integers_have_rows_enough(rows: int, decomposed: bool) -> None:
    torch.manual_seed(0)
    left = torch.randint(-128, 127, (rows, 32), dtype=torch.int8)
    right = torch.randint(-128, 127, (32, 24), dtype=torch.int8)
    graph = fx.Graph()
    a, b = (graph.placeholder(name) for name in "ab")
    a.meta["val"], b.meta["val"] = left.to("meta"), right.to("meta")
    if decomposed:
        product = graph.call_function(torch.ops.aten._int_mm.default, (a, b))
    else:
        product = graph.call_function(out_dtype, (torch.ops.aten.mm.default, torch.int32, a, b))
    product.meta["val"] = torch.empty(rows, 24, dtype=torch.int32, device="meta")
    graph.output(product)
    fill_rows(graph)
    (found,) = graph.find_nodes(op="call_function", target=product.target)
    assert found.args[-2].meta["val"].shape[0] == 17
    assert all("val" in n.meta for n in graph.nodes if n.op == "call_function")
    got = fx.Interpreter(torch.nn.Module(), graph=graph).run(left, right)
    assert torch.equal(got, left.int() @ right.int())


@pytest.mark.parametrize("kind", ["torchao int8", "GGUF Q4_K"])
def test_weights_go_elsewhere_although_somebody_refers_to_them(kind: str, tmp_path: Path) -> None:
    module = quantized.KINDS[kind][0](tmp_path)
    weights = [p for p in module.parameters() if type(p) is not torch.nn.Parameter]
    references = [weakref.ref(p) for p in weights]
    move(module, torch.device("meta"))
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert len(references) == len(weights) > 0
