"""Attention by the kernels that were chosen: kept by components, and noticed where they change."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import quantized
import torch
from diffusers.models import attention_dispatch
from tiny_pipelines import draw, tiny_sd
from torch.nn.attention import SDPBackend, sdpa_kernel

import asyncdiff
from asyncdiff import AsyncDenoiser
from asyncdiff.graph.layers.attention import attend, chosen_kernels
from asyncdiff.partition.cost import count_macs

FLOAT = torch.float32
TIMES = torch.tensor([0.5, 0.25])


@pytest.fixture(autouse=True)
def chosen_before() -> Any:
    """What diffusers remembers of a denoiser's backend for all others."""
    registry = attention_dispatch._AttentionBackendRegistry
    before = registry._active_backend
    yield
    registry.set_active_backend(before)


def attention_nodes(denoiser: Any) -> list[Any]:
    nodes = denoiser.partition.captured.nodes
    return [n for n in nodes if "attention" in str(n.target)]


def run(denoiser: Any, call: dict[str, Any]) -> torch.Tensor:
    with denoiser.generation(TIMES):
        return denoiser(**call)[0]


@pytest.mark.parametrize("backend", ["native", "_native_math", "_native_flash"])
def test_a_backend_of_torch_is_kept(backend: str) -> None:
    module, call = quantized.transformer(FLOAT), quantized.arguments(FLOAT)
    other = module(**call)[0]
    module.set_attention_backend(backend)
    try:
        want = module(**call)[0]
    except RuntimeError as e:
        pytest.skip(f"there is none for CPUs: {e}")
    denoiser = AsyncDenoiser(module, (), call, components=2, warmup=2, split="estimate")
    with contextlib.closing(denoiser):
        assert torch.equal(run(denoiser, call), want)
        targets = {str(n.target) for n in attention_nodes(denoiser)}
    chosen = "aten.scaled_dot_product_attention" if backend == "native" else "asyncdiff.attention"
    assert targets == {f"{chosen}.default"}
    if backend == "_native_math":
        assert not torch.equal(want, other)  # so that it would show


@pytest.mark.slow
def test_a_backend_that_changes() -> None:
    """Between generations: by the denoiser's own method, and around a call."""
    pipe, given = quantized.pipeline(quantized.transformer(FLOAT))
    given = {n: x.float() if isinstance(x, torch.Tensor) else x for n, x in given.items()}
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, warmup=3, split="estimate") as handle:
        native = draw(pipe, given)
        pipe.transformer.set_attention_backend("_native_math")
        by_math = draw(pipe, given)
        assert {str(n.target) for n in attention_nodes(handle)} == {"asyncdiff.attention.default"}
        pipe.transformer.reset_attention_backend()
        with attention_dispatch.attention_backend("native"):
            assert torch.equal(draw(pipe, given), native)
        with attention_dispatch.attention_backend("_native_math"):
            assert torch.equal(draw(pipe, given), by_math)
    assert not torch.equal(native, by_math)
    pipe.transformer.set_attention_backend("_native_math")
    assert torch.equal(draw(pipe, given), by_math)


def test_kernels_that_the_caller_chooses() -> None:
    """As diffusers' older processors take them."""
    pipe, call = tiny_sd()
    with sdpa_kernel(SDPBackend.MATH):
        want = draw(pipe, call)
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, warmup=4, split="estimate") as handle:
        with sdpa_kernel(SDPBackend.MATH):
            assert torch.equal(draw(pipe, call), want)
        assert "asyncdiff.attention.default" in {str(n.target) for n in attention_nodes(handle)}
        draw(pipe, call)
        assert "asyncdiff.attention.default" not in {str(n.target) for n in attention_nodes(handle)}


def opaque(query: Any, key: Any, value: Any, attn_mask: Any = None, scale: Any = None) -> Any:
    """Attention that no exporter can look into, as kernels of other packages: (B, L, heads, D)."""
    assert attn_mask is None
    q, k, v = (x.permute(0, 2, 1, 3).numpy() for x in (query, key, value))
    q, k, v = (torch.from_numpy(x) for x in (q, k, v))
    scores = q @ k.mT * (scale or 1 / math.sqrt(q.shape[-1]))
    return (scores.softmax(-1) @ v).permute(0, 2, 1, 3)


def test_a_kernel_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = attention_dispatch._AttentionBackendRegistry
    sage = attention_dispatch.AttentionBackendName.SAGE
    monkeypatch.setitem(registry._backends, sage, opaque)
    names = {"query", "key", "value", "attn_mask", "scale"}
    monkeypatch.setitem(registry._supported_arg_names, sage, names)
    module, call = quantized.transformer(FLOAT), quantized.arguments(FLOAT)
    for layer in module.modules():
        if hasattr(getattr(layer, "processor", None), "_attention_backend"):
            layer.processor._attention_backend = sage
    with torch.no_grad():
        want = module(**call)[0]
    denoiser = AsyncDenoiser(module, (), call, components=2, warmup=2, split="estimate")
    with contextlib.closing(denoiser):
        assert registry._backends[sage] is opaque
        assert torch.equal(run(denoiser, call), want)
        nodes = attention_nodes(denoiser)
        assert {str(n.target) for n in nodes} == {"asyncdiff.attention_of.default"}
        tokens, heads, width = 16 + 8, 2, 32
        macs = count_macs(denoiser.partition.captured)
        assert {macs[n] for n in nodes} == {2 * heads * tokens * tokens * width}


def test_masks_and_what_else_attention_takes() -> None:
    """By the math alone, the same as torch does it."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 6, 8, generator=generator) for _ in range(3))
    mask = torch.rand(2, 1, 6, 6, generator=generator) > 0.3
    few = k[:, :2], v[:, :2]
    with sdpa_kernel(SDPBackend.MATH):
        for args, kwargs in (
            ((q, k, v), {}),
            ((q, k, v, mask), {}),
            ((q, k, v, mask.float()), {"scale": 0.3}),
            ((q, k, v), {"is_causal": True}),
            ((q, *few), {"enable_gqa": True}),
            ((), {"query": q, "key": k, "value": v, "attn_mask": mask, "dropout_p": 0.0}),
        ):
            want = torch.nn.functional.scaled_dot_product_attention(*args, **kwargs)
            torch.testing.assert_close(attend(*args, **kwargs), want, rtol=0, atol=0)
        assert chosen_kernels() == [SDPBackend.MATH]
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(attend(q, k, v), want, rtol=0, atol=0)
