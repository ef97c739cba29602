"""The engine on GPUs: reference results, CUDA graphs, the same bits on one GPU and on two."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import reference
import torch
from conftest import PLACES, devices_for
from toys import toy, toy_call

import asyncdiff
from asyncdiff import AsyncDenoiser, InputError, RankError
from asyncdiff.graph import weights
from asyncdiff.runtime.cuda_graphs import Issued
from asyncdiff.runtime.engine import Engine

pytestmark = pytest.mark.usefixtures("full_float32")

SPLIT = [["enter", "down"], ["mix", "up", "leave"]]
TIMES = torch.tensor([900 - 100 * k for k in range(8)])


def names(place: str, ranks: int) -> list[str]:
    return [f"cuda:{d}" for d in devices_for(place, ranks)]


def toy_on_gpu(**options: Any) -> AsyncDenoiser:
    return AsyncDenoiser(toy().to("cuda:0", torch.float32), split=SPLIT, **options)


def on_gpu(call: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        k: v.to("cuda:0", dtype if v.is_floating_point() else v.dtype)
        if isinstance(v, torch.Tensor)
        else v
        for k, v in call.items()
    }


def run(denoiser: AsyncDenoiser, call: dict[str, Any], times: torch.Tensor = TIMES) -> torch.Tensor:
    latents = call["sample"]
    text = call["encoder_hidden_states"]
    with denoiser.generation(times):
        for t in times:
            (noise,) = denoiser(latents, t.to(latents.device), encoder_hidden_states=text)
            latents = latents - 0.1 * noise
    return latents


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", reference.NAMES)
def test_reference_case(name: str, place: str) -> None:
    spec = reference.case(name)
    pipe = reference.pipeline(spec, "cuda:0")
    devices = names(place, spec["components"] + spec["stride"] - 1)
    handle = asyncdiff.parallelize(pipe, devices=devices, **reference.settings(spec))
    got = reference.run(pipe, spec)
    assert reference.distance(got, reference.expected()[name]) < 1e-3
    assert torch.equal(reference.run(pipe, spec), got)
    report = handle.report()
    assert report.cuda_graphs
    assert report.exposed_ms is not None
    handle.restore()
    assert str(pipe.unet.device) == "cuda:0"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sd21_ddim_n2s1w1", "sd21_ddim_n2s2w1", "sdxl_euler_n3s2w1"])
def test_one_gpu_and_two_give_the_same_bits(name: str, dtype: torch.dtype) -> None:
    spec = reference.case(name)
    ranks = spec["components"] + spec["stride"] - 1
    results = []
    for place in PLACES:
        pipe = reference.pipeline(spec, "cuda:0", dtype)
        handle = asyncdiff.parallelize(
            pipe, devices=names(place, ranks), **reference.settings(spec)
        )
        results.append(reference.run(pipe, spec))
        handle.restore()
    assert torch.equal(*results)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("components", "stride"), [(1, 1), (2, 1), (2, 2)])
def test_all_steps_exact_is_the_plain_pipeline(place: str, components: int, stride: int) -> None:
    spec = reference.case("sd21_ddim_n1s1")
    pipe = reference.pipeline(spec, "cuda:0")
    plain = reference.run(pipe, spec)
    devices = names(place, components + stride - 1)
    handle = asyncdiff.parallelize(
        pipe, devices=devices, components=components, stride=stride, warmup=spec["steps"]
    )
    assert reference.distance(reference.run(pipe, spec), plain) < 1e-6
    handle.restore()
    assert torch.equal(reference.run(pipe, spec), plain)


@pytest.mark.parametrize("place", PLACES)
def test_graphs_and_eager_give_the_same_bits(place: str) -> None:
    call = on_gpu(toy_call())
    denoiser = toy_on_gpu(devices=names(place, 2))
    want = run(denoiser, call)
    assert denoiser.report().cuda_graphs
    denoiser.close()
    eager = toy_on_gpu(devices=names(place, 2))
    eager.prepare(**call)
    for worker in eager._engine.workers:  # type: ignore[union-attr]
        worker.graphs.used = False
    assert torch.equal(run(eager, call), want)
    assert not eager.report().cuda_graphs
    eager.close()


def test_shapes_dtypes_and_step_counts_change() -> None:
    denoiser = AsyncDenoiser(toy().to("cuda:0", torch.float32), devices=["cuda:0"] * 2, split=SPLIT)
    cases = [
        (on_gpu(toy_call(batch=b, size=s)), TIMES[:n])
        for b, s, n in [(2, 8, 8), (1, 8, 3), (2, 16, 8), (2, 8, 5), (4, 8, 2), (1, 16, 8)]
    ]
    first = [run(denoiser, c, t) for c, t in cases]
    assert len(denoiser._engines) <= 4
    second = [run(denoiser, c, t) for c, t in cases]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    denoiser.close()


class Syncing(torch.nn.Module):
    """A denoiser whose second half waits for the GPU, which no capture allows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(4, 4, 3, padding=1)
        self.second = torch.nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        x = self.first(sample) + timestep
        return (self.second(torch.ops.asyncdiff_test.through_host(x)),)


@torch.library.custom_op("asyncdiff_test::through_host", mutates_args=())
def through_host(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().to(x.device)


@through_host.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_what_cannot_be_captured_runs_eagerly_with_one_logged_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    module = Syncing().to("cuda:0")
    latents = torch.randn(2, 4, 8, 8, device="cuda:0")
    want = latents
    for t in TIMES:
        (noise,) = module(want, t.to("cuda:0"))
        want = want - 0.1 * noise
    denoiser = AsyncDenoiser(
        module, devices=["cuda:0"] * 2, split=[["first"], ["second"]], warmup=len(TIMES)
    )
    with caplog.at_level(logging.WARNING, "asyncdiff"):
        for _ in range(2):
            got = latents
            with denoiser.generation(TIMES):
                for t in TIMES:
                    (noise,) = denoiser(got, t.to("cuda:0"))
                    got = got - 0.1 * noise
    assert torch.allclose(got, want, atol=1e-5)
    said = [r for r in caplog.records if "without CUDA graphs" in r.message]
    assert len(said) == 1
    assert not denoiser.report().cuda_graphs
    denoiser.close()


def test_a_lack_of_memory_in_a_capture_is_raised_and_graphs_go_on() -> None:
    """Nothing of the capture is left behind, in torch's allocator neither."""
    call = on_gpu(toy_call())
    denoiser = toy_on_gpu(devices=["cuda:0"] * 2)
    want = run(denoiser, call)
    worker = denoiser._engines.get(denoiser.parse((), call)).workers[0]

    def too_much() -> Issued:
        torch.empty(1 << 45, dtype=torch.uint8, device="cuda:0")
        return Issued([])

    def forbidden() -> Issued:
        torch.zeros(1, device="cuda:0").item()
        return Issued([])

    with worker.current():
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                worker.graphs.record("too much", too_much)
        assert worker.graphs.used
        worker.graphs.record("forbidden", forbidden)
        assert not worker.graphs.used
        worker.graphs.try_again()
        assert worker.graphs.used
    assert torch.equal(run(denoiser, call), want)
    assert denoiser.report().cuda_graphs
    denoiser.close()


def test_engines_of_others_make_room() -> None:
    denoiser = toy_on_gpu(devices=["cuda:0"] * 2)
    calls = [on_gpu(toy_call(batch=b)) for b in (1, 2, 3)]
    want = [run(denoiser, c) for c in calls[:2]]
    prepare, failed = Engine.prepare, []

    def once(engine: Engine, plan: Any) -> None:
        if not failed:
            failed.append(len(denoiser._engines))
            torch.empty(1 << 45, dtype=torch.uint8, device="cuda:0")
        prepare(engine, plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "prepare", once)
        run(denoiser, calls[2])
    assert failed == [3] and len(denoiser._engines) == 1
    assert all(torch.equal(run(denoiser, c), w) for c, w in zip(calls, want, strict=False))
    denoiser.close()


def test_inference_mode_keeps_rows_and_conditioning() -> None:
    """The host looks at nothing while a generation runs, and is told in the end."""
    denoiser = toy_on_gpu(devices=["cuda:0"] * 2)
    want = run(denoiser, on_gpu(toy_call()))
    with torch.inference_mode():
        call = on_gpu(toy_call())
        call = {k: t.clone() for k, t in call.items()}
        for _ in range(2):
            assert torch.equal(run(denoiser, call), want)
        text = call["encoder_hidden_states"]
        latents = call["sample"]
        with pytest.raises(InputError, match="Pass another tensor"), denoiser.generation(TIMES):
            for k, t in enumerate(TIMES):
                if k == 2:
                    text.mul_(2)
                denoiser(latents, t.to("cuda:0"), encoder_hidden_states=text)
    denoiser.close()


@pytest.mark.parametrize("place", PLACES)
def test_each_gpu_holds_its_own_component_only(place: str) -> None:
    if place == "one GPU":
        pytest.skip("one GPU holds all components")
    devices = names(place, 2)
    module = torch.nn.Sequential(*(torch.nn.Linear(4096, 4096) for _ in range(8)))

    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = module

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.layers(sample) + timestep,)

    whole = 8 * 4096 * 4097 * 4
    torch.cuda.empty_cache()
    before = [torch.cuda.memory_allocated(d) for d in range(2)]
    denoiser = AsyncDenoiser(
        Wide().to("cuda:0"),
        (torch.zeros(2, 4096, device="cuda:0"), TIMES[0].to("cuda:0")),
        devices=devices,
        split="estimate",
        compile=False,  # the default for so many parameters; nothing here depends on it
    )
    held = [torch.cuda.memory_allocated(d) - b for d, b in zip(range(2), before, strict=True)]
    assert all(h < 0.7 * whole for h in held)
    denoiser.close()


@pytest.mark.parametrize("place", PLACES)
def test_weights_leave_while_ranks_are_made(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is room, else before: the same bits, and the same weights on the host."""
    if place == "one GPU":
        pytest.skip("on one GPU weights stay")
    call, results = on_gpu(toy_call()), []
    values = {n: w.clone() for n, w in toy().float().state_dict().items()}
    for room in (True, False):
        monkeypatch.setattr(weights, "has_room", lambda *_, room=room: room)
        denoiser = toy_on_gpu(devices=names(place, 2))
        assert denoiser._weights.leaves == room
        results.append(run(denoiser, call))
        for name, weight in denoiser.module.state_dict().items():
            assert weight.device.type == "cpu" and torch.equal(weight, values[name])
        results.append(run(denoiser, call))
        denoiser.close()
        for name, weight in denoiser.module.state_dict().items():
            assert weight.is_cuda and torch.equal(weight.cpu(), values[name])
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("place", PLACES)
def test_a_rank_that_raises(place: str) -> None:
    denoiser = toy_on_gpu(devices=names(place, 2), deadline=5.0)
    call = on_gpu(toy_call())
    want = run(denoiser, call)
    worker = denoiser._engine.workers[0]  # type: ignore[union-attr]
    sound, count = worker.run, iter(range(1000))

    def broken(slots: Any) -> Any:
        if next(count) == 3:
            raise RuntimeError("a cosmic ray")
        return sound(slots)

    worker.run = broken  # type: ignore[method-assign]
    with pytest.raises(RankError, match=r"rank 0 .*cosmic ray"):
        run(denoiser, call)
    worker.run = sound  # type: ignore[method-assign]
    assert torch.equal(run(denoiser, call), want)
    denoiser.close()


def test_a_rank_that_never_sends_is_an_error_within_the_deadline() -> None:
    denoiser = toy_on_gpu(devices=["cuda:0"] * 2, deadline=0.5)
    call = on_gpu(toy_call())
    want = run(denoiser, call)
    worker = denoiser._engine.workers[0]  # type: ignore[union-attr]
    sound, kept = worker.run, denoiser._engine  # type: ignore[union-attr]
    worker.run = lambda slots: Issued([])  # type: ignore[method-assign]
    with pytest.raises(RankError, match="get of slot"):
        run(denoiser, call)
    worker.run = sound  # type: ignore[method-assign]
    assert denoiser._engine is kept
    assert torch.equal(run(denoiser, call), want)
    denoiser.close()


def test_concurrent_generations_take_turns() -> None:
    denoiser = toy_on_gpu(devices=["cuda:0"] * 2)
    calls = [on_gpu(toy_call(seed=s)) for s in range(4)]
    want = [run(denoiser, c) for c in calls]
    got: list[Any] = [None] * 4

    def work(i: int) -> None:
        got[i] = run(denoiser, calls[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert all(g is not None and torch.equal(g, w) for g, w in zip(got, want, strict=True))
    denoiser.close()


def test_tensors_on_the_cpu_and_missing_devices_are_refused() -> None:
    denoiser = toy_on_gpu(devices=["cuda:0"] * 2)
    with pytest.raises(InputError, match="is on cpu, but the ranks run on a GPU"):
        run(denoiser, toy_call())
    denoiser.close()
    count = torch.cuda.device_count()
    with pytest.raises(asyncdiff.DeviceError, match=f"cuda:{count}"):
        toy_on_gpu(devices=["cuda:0", f"cuda:{count}"])
    with pytest.raises(asyncdiff.DeviceError, match="mixes"):
        toy_on_gpu(devices=["cuda:0", "cpu"])


@pytest.mark.parametrize("place", PLACES)
def test_inputs_and_options_that_change_on_the_way(place: str) -> None:
    """The rest of the steps, of half the batch or with FreeU, is a generation with engines of its
    own; the other engine's are used again in the next picture."""
    from diffusers.callbacks import SDCFGCutoffCallback

    spec = reference.case("sd21_ddim_n2s2w1")
    pipe = reference.pipeline(spec, "cuda:0", torch.float32)
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=3)

    def change(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 5:
            pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
        return cutoff.callback_fn(pipe, step, timestep, kwargs)

    def run() -> torch.Tensor:
        pipe.disable_freeu()
        return reference.run(
            pipe,
            spec,
            num_inference_steps=8,
            callback_on_step_end=change,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )

    want = run()
    pipe.disable_freeu()
    handle = asyncdiff.parallelize(
        pipe, devices=devices_for(place, 2), warmup=8, split=spec["split"]
    )
    for _ in range(2):
        assert reference.distance(run(), want) < 1e-4
        assert handle.report().steps == 2
    assert len(handle.denoiser._engines) == 3
    handle.denoiser.configure(warmup=1)
    got = run()
    assert torch.equal(run(), got) and 0 < reference.distance(got, want) < 1
    handle.restore()
