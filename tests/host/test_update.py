"""The update's Triton kernels in the interpreter, and what the update promises."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import update_worker
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from asyncdiff.sampler import LinearSampler
from asyncdiff.update import Update, kernels

WORKER = Path(update_worker.__file__)
CASES = [*update_worker.CASES, *update_worker.SCHEDULER_CASES, "a whole generation"]


@cache
def errors() -> dict[str, float]:
    """Of all cases, from one process: Triton chooses its interpreter when it is imported."""
    done = subprocess.run(
        [sys.executable, str(WORKER), "cpu"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_kernels_in_the_interpreter(name: str) -> None:
    # The interpreter cuts bfloat16 off where GPUs and torch round it.
    assert errors()[name] < (0.02 if name == "bfloat16" else 1e-6)


@needs_triton
@pytest.mark.parametrize(
    ("width", "served", "guided", "rescaled", "prediction", "compute", "latents"),
    [
        (1, 1, False, False, "fp32", "fp32", "fp32"),
        (1, 1, True, False, "fp16", "fp32", "fp16"),
        (2, 2, True, True, "bf16", "fp32", "bf16"),
        (3, 4, True, True, "fp16", "fp32", "fp32"),
        (5, 3, True, False, "fp32", "fp32", "fp16"),
        (8, 4, True, True, "fp64", "fp64", "fp64"),
    ],
)
def test_kernels_compile_for_a_gpu(
    width: int,
    served: int,
    guided: bool,
    rescaled: bool,
    prediction: str,
    compute: str,
    latents: str,
) -> None:
    """For an H100 or H200, whatever this machine has: the interpreter allows more than GPUs do."""
    import triton.language as tl

    from asyncdiff import update_kernels

    types = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32, "fp64": tl.float64}
    numbers = dict.fromkeys(("state", "table", "scales", "guidance", "moments"), f"*{compute}")
    common = numbers | {f"p{i}": f"*{prediction}" for i in range(4)}
    common |= dict.fromkeys(("batch", "n", "blocks", "count", "served"), "i32")
    common |= {"step": "*i64", "ticks": "*i64", "into": f"*{prediction}"}
    block = {"SERVED": served, "COMPUTE": types[compute]}
    compile_for_gpu(
        update_kernels.update_kernel,
        common,
        block
        | {"AHEAD": 0, "WIDTH": width, "PAD": 1 << (width - 1).bit_length(), "GUIDED": guided}
        | {"RESCALED": rescaled, "COPIES": 1 + guided, "ROUND": types[latents]}
        | {"BLOCK": 128, "MOMENTS_BLOCK": 1024, "MOMENTS_PAD": 64},
    )
    compile_for_gpu(update_kernels.moments_kernel, common, block | {"BLOCK": 1024})
    for has_target, has_step, of in (
        (True, True, "i64"),
        (True, False, prediction),
        (False, True, "i64"),
    ):
        compile_for_gpu(
            update_kernels.clock_kernel,
            common | {"table": f"*{of}", "target": f"*{of}"},
            {"HAS_TARGET": has_target, "HAS_STEP": has_step, "BLOCK": 512},
        )


def compile_for_gpu(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> None:
    """Down to machine code of compute capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    fixed = {(names.index(n),): value for n, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


def test_plain_torch_without_a_gpu() -> None:
    assert kernels(torch.device("cpu"), None) is None


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_guidance_is_that_of_diffusers(rescale: float, dtype: torch.dtype) -> None:
    """With a sampler whose next latents are the guided prediction."""
    g = torch.Generator().manual_seed(0)
    prediction = torch.randn(4, 4, 9, 7, generator=g).to(dtype)
    only = torch.tensor([[[0.0, 1.0]]], dtype=torch.float64)
    sampler = LinearSampler("", torch.zeros(1), torch.ones(1, dtype=torch.float64), only, 0.0)
    update = Update(
        (2, 4, 9, 7),
        dtype,
        torch.device("cpu"),
        1,
        1,
        guided=True,
        rescaled=rescale > 0,
    )
    update.load(sampler, torch.zeros(2, 4, 9, 7), 6.0, rescale)
    update.advance([prediction], None)
    u, c = prediction.double().chunk(2)
    want = u + 6.0 * (c - u)
    if rescale:
        want = rescale_noise_cfg(want, c, rescale)
    near = 1e-6 if dtype is torch.float32 else 1e-3  # one rounding
    torch.testing.assert_close(update.latents.double(), want, rtol=near, atol=near)


def test_latents_are_rounded_and_memory_is_not() -> None:
    """x is float16 after every step; what the sampler remembers stays float32."""
    steps = torch.tensor([[[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]], dtype=torch.float64)
    ones = torch.ones(1, dtype=torch.float64)
    update = Update((1, 3), torch.float16, torch.device("cpu"), 1, 2)
    update.load(LinearSampler("", ones, ones, steps, 0.0), torch.zeros(1, 3))
    noise = torch.tensor([[0.1, 0.2, 0.3]])
    update.advance([noise], None)
    assert torch.equal(update.state[0], noise.half().float())
    assert torch.equal(update.state[1], noise)
    assert update.latents.dtype is torch.float16


@pytest.mark.parametrize("rescaled", [False, True])
def test_a_step_without_a_prediction(rescaled: bool) -> None:
    """Its weight is zero: nothing of what stands in for the prediction reaches the latents."""
    g = torch.Generator().manual_seed(0)
    steps = torch.randn(1, 2, 3, generator=g, dtype=torch.float64)
    steps[:, :, 2] = 0
    times, scales = torch.arange(1), torch.ones(1, dtype=torch.float64)
    sampler = LinearSampler("test", times, scales, steps, 0.0)
    shape = (2, 4, 8, 8)
    latents = torch.randn(shape, generator=g)
    device = torch.device("cpu")
    update = Update(shape, torch.float32, device, 1, 2, guided=True, rescaled=rescaled)
    update.load(sampler, latents, 5.0, 0.7)
    update.advance([], None)
    torch.testing.assert_close(update.latents, float(steps[0, 0, 0]) * latents)
