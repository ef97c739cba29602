"""The update's kernels compiled, and whole generations with one CUDA graph a rank and tick."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
import update_worker
from conftest import PLACES, devices_for
from toys import toy, toy_call

import asyncdiff
from asyncdiff import AsyncDenoiser, RankError
from asyncdiff.clock import Clock
from asyncdiff.update import Update

pytestmark = pytest.mark.usefixtures("full_float32")

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SPLITS = {
    1: [["enter", "down", "mix", "up", "leave"]],
    2: [["enter", "down"], ["mix", "up", "leave"]],
    3: [["enter", "down.0"], ["down.1", "down.2", "mix"], ["up", "leave"]],
}
CIRCLE = [["down.1", "down.2", "mix"], ["enter", "down.0", "up", "leave"]]


def scheduler(name: str = "DDIMScheduler", **options: Any) -> Any:
    import diffusers

    return getattr(diffusers, name).from_config({"clip_sample": False, **SD, **options})


def names(place: str, ranks: int) -> list[str]:
    return [f"cuda:{d}" for d in devices_for(place, ranks)]


# ---- kernels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", update_worker.CASES)
def test_kernels_against_torch(name: str) -> None:
    case = update_worker.CASES[name]
    # Where the two compute a last bit differently, a rounding of the latents may go the other way.
    near = {"float16": 4e-3, "bfloat16": 3e-2}.get(case[4], 2e-6)
    assert update_worker.against_torch(torch.device("cuda:0"), case) < near


@pytest.mark.parametrize("name", update_worker.SCHEDULER_CASES)
def test_kernels_against_schedulers(name: str) -> None:
    case = update_worker.SCHEDULER_CASES[name]
    assert update_worker.against_scheduler(torch.device("cuda:0"), *case) < 2e-6


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("served", [1, 2, 6])
def test_captured_and_replayed(served: int, rescaled: bool) -> None:
    """Nothing of a step is frozen into the graph: replays go on from step to step."""
    device = torch.device("cuda:0")
    g = torch.Generator().manual_seed(0)
    sampler = update_worker.random_sampler(2, 12, g)
    shape = (2, 4, 64, 64)
    noises = torch.randn(12, 4, *shape[1:], generator=g).to(device, torch.float16)
    latents = torch.randn(shape, generator=g).to(device)
    results = []
    for graphed in (False, True):
        update = Update(shape, torch.float32, device, 12, 2, guided=True, rescaled=rescaled)
        table = torch.arange(1 + 12 // served, device=device)[:, None].repeat(1, 5000)
        time = torch.zeros_like(table[0])
        clock = Clock(time, table, device, update.step)
        into = torch.zeros(4, *shape[1:], device=device, dtype=torch.float16)
        inputs = [torch.zeros_like(noises[0]) for _ in range(served)]

        def work(
            update: Update = update,
            clock: Clock = clock,
            inputs: list[torch.Tensor] = inputs,
            into: torch.Tensor = into,
        ) -> None:
            update.advance(inputs, into)
            clock.advance(served)

        work()  # loads the kernels
        graph = torch.cuda.CUDAGraph()
        if graphed:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                work()
        update.load(sampler, latents, 7.5, 0.7)
        clock.load()
        path = []
        for k in range(0, 12, served):
            assert bool((time == k // served).all())
            for i, tensor in enumerate(inputs):
                tensor.copy_(noises[k + i])
            graph.replay() if graphed else work()
            path += [update.latents, into.clone()]
        results.append(path)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# ---- generations ---------------------------------------------------------------------------------


def toys(place: str, components: int = 2, stride: int = 1, warmup: int = 1, **options: Any) -> Any:
    options.setdefault("split", SPLITS[components])
    return AsyncDenoiser(
        toy().to("cuda:0", torch.float32),
        devices=names(place, components + stride - 1),
        components=components,
        stride=stride,
        warmup=warmup,
        **options,
    )


def generate(denoiser: Any, sampler: Any, steps: int = 9, **options: Any) -> torch.Tensor:
    call = toy_call(batch=2)
    guided = options.get("guidance_scale", 1.0) > 1
    latents = call["sample"][: 1 if guided else 2].to("cuda:0", torch.float32)
    text = call["encoder_hidden_states"].to("cuda:0", torch.float32)
    return denoiser.generate(
        latents,
        {"encoder_hidden_states": text},
        sampler,
        num_inference_steps=steps,
        **options,
    )


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("components", [1, 2, 3])
@pytest.mark.parametrize(("stride", "warmup"), [(1, 1), (2, 1), (2, 3), (3, 2)])
def test_equals_the_schedulers_steps(place: str, components: int, stride: int, warmup: int) -> None:
    denoiser = toys(place, components, stride, warmup)
    for name in ("DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        for steps in (7, 8):
            options = {"guidance_scale": 5.0, "guidance_rescale": 0.5}
            got = generate(denoiser, scheduler(name), steps, update="linear", **options)
            assert denoiser.report().cuda_graphs
            want = generate(denoiser, scheduler(name), steps, update="scheduler", **options)
            assert reference.distance(got, want) < 1e-5
            again = generate(denoiser, scheduler(name), steps, update="linear", **options)
            assert torch.equal(got, again)
    denoiser.close()


@pytest.mark.parametrize("place", PLACES)
def test_components_in_a_circle(place: str) -> None:
    denoiser = toys(place, 2, 2, split=CIRCLE)
    got = generate(denoiser, scheduler(), update="linear")
    assert reference.distance(got, generate(denoiser, scheduler(), update="scheduler")) < 1e-5
    denoiser.close()


@pytest.mark.parametrize("place", PLACES)
def test_one_graph_launch_a_rank_and_tick(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = toys(place, 2, 2)
    want = generate(denoiser, scheduler(), 21, update="linear")
    launches = []
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: Any) -> None:
        launches.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    assert torch.equal(generate(denoiser, scheduler(), 21, update="linear"), want)
    # One exact tick, ten of two steps on three ranks, and a last update on every reader.
    assert 3 * 10 < len(launches) <= 3 * 10 + 3 + 3
    denoiser.close()


def test_graphs_and_eager_and_one_gpu_and_two_give_the_same_bits() -> None:
    results = []
    for place in PLACES:
        if place == "several GPUs" and torch.cuda.device_count() < 2:
            continue
        denoiser = toys(place, 2, 2)
        results.append(generate(denoiser, scheduler(), update="linear", guidance_scale=4.0))
        for worker in denoiser._engine.workers:
            worker.graphs = False
        results.append(generate(denoiser, scheduler(), update="linear", guidance_scale=4.0))
        denoiser.close()
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_unet_as_in_its_pipeline(place: str, dtype: torch.dtype, stride: int) -> None:
    """generate() on the denoiser of a parallelised pipeline, against that pipeline."""
    spec = reference.case("sd21_ddim_n2s1w1")
    pipe = reference.pipeline(spec, "cuda:0", dtype)
    handle = asyncdiff.parallelize(
        pipe, devices=names(place, 1 + stride), stride=stride, split=spec["split"]
    )
    want = reference.run(pipe, spec)
    call = reference.inputs(spec, "cuda:0", dtype)
    text = torch.cat([call["negative_prompt_embeds"], call["prompt_embeds"]])
    options = dict.fromkeys(("timestep_cond", "cross_attention_kwargs", "added_cond_kwargs"))
    got = handle.denoiser.generate(
        call["latents"],
        {"encoder_hidden_states": text, **options},
        type(pipe.scheduler).from_config(pipe.scheduler.config),
        num_inference_steps=spec["steps"],
        guidance_scale=spec["guidance_scale"],
        update="linear",
    )
    near = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.06}[dtype]
    assert reference.distance(got, want) < near
    if dtype is torch.float32 and stride == 1:
        assert reference.distance(got, reference.expected()[spec["name"]]) < 1e-3
    assert handle.report().cuda_graphs and handle.report().exposed_ms is not None
    handle.restore()


def test_plain_and_whole_generations_alternate() -> None:
    """Both use the same mailboxes and the same pool of memory for graphs."""
    denoiser = toys("one GPU", 3, 2)
    whole = generate(denoiser, scheduler(), update="linear")
    steps = generate(denoiser, scheduler(), update="scheduler")
    for _ in range(3):
        assert torch.equal(generate(denoiser, scheduler(), update="linear"), whole)
        assert torch.equal(generate(denoiser, scheduler(), update="scheduler"), steps)
    denoiser.close()


def test_a_rank_that_fails() -> None:
    denoiser = toys("one GPU")
    want = generate(denoiser, scheduler(), update="linear")
    worker = denoiser._engine.workers[1]
    sound = worker.issue

    def broken(*args: Any) -> Any:
        raise RuntimeError("a cosmic ray")

    worker.issue = broken
    with pytest.raises(RankError, match=r"rank 1 .*cosmic ray"):
        generate(denoiser, scheduler(), update="linear")
    worker.issue = sound
    assert torch.equal(generate(denoiser, scheduler(), update="linear"), want)
    denoiser.close()
