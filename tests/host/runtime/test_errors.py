"""What users get wrong, and what they are told."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import reference
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler
from toys import toy, toy_call

import asyncdiff
import asyncdiff_core as core
from asyncdiff import (
    AsyncDenoiser,
    CaptureError,
    DeviceError,
    InputError,
    PartitionError,
    PlanError,
    SchedulerError,
)
from asyncdiff.environment import prepare_deadline
from asyncdiff.generation.spec import GenerationSpec
from asyncdiff.processes.team import Team
from asyncdiff.runtime.devices import Place, fabric
from asyncdiff.runtime.engine import Engine

SPEC = reference.SMALL


def test_an_error_of_a_rank_keeps_it() -> None:
    error = asyncdiff.RankError(3, "lost")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (type(again), again.rank, str(again)) == (asyncdiff.RankError, 3, "lost")


def make(**options: Any) -> AsyncDenoiser:
    return AsyncDenoiser(toy(), **({"devices": ["cpu"] * 2} | options))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"devices": ["cpu"] * 3}, DeviceError, r"components \+ stride - 1 = 2"),
        ({"devices": ["cpu"] * 2, "stride": 2}, DeviceError, "2 devices for 3 ranks"),
        ({"devices": "cpu"}, DeviceError, r"\['cpu'\] \* 2"),
        ({"devices": "cpu, cpu"}, DeviceError, r"write \['cpu', 'cpu'\]$"),
        ({"devices": ["cpu", "gpu"]}, DeviceError, "'gpu' is not a device"),
        ({"devices": ["cpu", "cuda:0"]}, DeviceError, "mixes cpu and cuda"),
        ({"devices": ["meta"] * 2}, DeviceError, "ranks run on"),
        ({"deadline": -1}, InputError, "deadline=-1: write a positive number"),
        ({"deadline": float("nan")}, InputError, "deadline=nan: .* at most a day"),
        ({"deadline": "soon"}, InputError, "deadline='soon': write a positive number of seconds"),
        ({"warmup": 0}, PlanError, "warmup must be"),
        ({"components": 0}, PlanError, "components must be"),
        ({"stride": 1.5}, PlanError, "stride must be"),
        ({"split": "half"}, PartitionError, "'auto'"),
        ({"split": ["enter", "leave"]}, PartitionError, "one list of module paths"),
        ({"split": [["enter"], ["leave"], ["mix"]]}, PartitionError, "3 parts"),
        ({"split": [["entry"], ["leave"]]}, PartitionError, "no module 'entry'"),
        ({"split": [["enter", "mix"], ["mix"]]}, PartitionError, "listed twice"),
        ({"split": [["down"], ["down.1", "leave"]]}, PartitionError, r"part of 'down'"),
        ({"split": [["enter"], []]}, PartitionError, "component 1 .* empty"),
    ],
)
def test_refused_at_once(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**options)


def test_the_deadline_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCDIFF_DEADLINE", "2.5")
    for options, seconds in [({}, 2.5), ({"deadline": 3.0}, 3.0)]:
        denoiser = make(example_kwargs=toy_call(), **options)
        assert isinstance(denoiser._engine, Engine)
        assert denoiser._engine.fabric.deadline == seconds
        denoiser.close()
    monkeypatch.setenv("ASYNCDIFF_DEADLINE", "soon")
    with pytest.raises(InputError, match="ASYNCDIFF_DEADLINE='soon'"):
        make()


def test_for_how_long_a_process_that_prepares_may_say_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("ASYNCDIFF_PREPARE_DEADLINE", raising=False)
    assert prepare_deadline() == 900
    monkeypatch.setenv("ASYNCDIFF_PREPARE_DEADLINE", "2.5")
    assert prepare_deadline() == 2.5
    for wrong in ("soon", "-1", "nan", "1e9"):
        monkeypatch.setenv("ASYNCDIFF_PREPARE_DEADLINE", wrong)
        with pytest.raises(InputError, match=f"ASYNCDIFF_PREPARE_DEADLINE='{wrong}'"):
            prepare_deadline()


def test_what_the_core_says_of_devices_is_a_device_error_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*args: Any, **options: Any) -> None:
        raise core.DeviceError("GPUs 0 and 1 do not reach each other")

    monkeypatch.setattr(core, "CudaFabric", refused)
    with pytest.raises(DeviceError, match="do not reach each other") as raised:
        fabric([Place.here(torch.device("cuda", i)) for i in range(2)], None, Team())
    # Whoever uses both packages may catch either.
    assert isinstance(raised.value, (core.DeviceError, asyncdiff.AsyncDiffError, ValueError))
    assert issubclass(DeviceError, core.DeviceError)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_here() -> None:
    with pytest.raises(DeviceError, match="asyncdiff doctor"):
        make(devices=["cuda:0", "cuda:1"])


def test_more_components_than_nodes() -> None:
    with pytest.raises(PartitionError, match="can be split into at most"):
        AsyncDenoiser(
            toy(),
            example_kwargs=toy_call(),
            devices=["cpu"] * 999,
            components=999,
            split="estimate",
        )


def test_a_component_without_work() -> None:
    with pytest.raises(PartitionError, match="component 0 of the split owns nothing"):
        AsyncDenoiser(
            toy(), example_kwargs=toy_call(), devices=["cpu"] * 2, split=[["time"], ["leave"]]
        )


def test_warmup_longer_than_the_generation() -> None:
    denoiser = make(warmup=5)
    with pytest.raises(PlanError, match="warmup=5 exceeds the 4 steps"):
        denoiser.start(GenerationSpec.of(denoiser.config, range(4)))


class Branching(torch.nn.Module):
    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return sample * 2 if sample.sum() > 0 else sample


class Writing(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        return sample * self.count


@pytest.mark.parametrize(
    ("module", "message"), [(Branching(), "branch on values"), (Writing(), "own buffers")]
)
def test_a_denoiser_that_cannot_be_exported(module: torch.nn.Module, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        AsyncDenoiser(module, (torch.ones(2, 4), torch.tensor(1)), devices=["cpu"], components=1)


def test_wrong_arguments(capfd: pytest.CaptureFixture[str]) -> None:
    denoiser = make()
    denoiser.start(GenerationSpec.of(denoiser.config, range(3)))
    with pytest.raises(InputError, match="cannot be called like this"):
        denoiser(toy_call()["sample"], no_such_argument=1)
    # Said of the call, not of exporting, and without pages of torch's log.
    with pytest.raises(InputError, match=r"Toy does not take these inputs \(sample \(2, 3, 8, 8\)"):
        denoiser(**(toy_call() | {"sample": torch.zeros(2, 3, 8, 8, dtype=torch.float64)}))
    three = {"encoder_hidden_states": toy_call(3)["encoder_hidden_states"]}
    with pytest.raises(InputError, match=r"encoder_hidden_states \(3, 5, 6\)\): RuntimeError"):
        denoiser(**(toy_call() | three))
    assert capfd.readouterr().err == ""
    with pytest.raises(InputError, match="sample is on meta"):
        denoiser(**(toy_call() | {"sample": torch.zeros(2, 4, 8, 8, device="meta")}))


def parallel(**options: Any) -> tuple[Any, Any]:
    pipe = reference.pipeline(SPEC)
    return pipe, asyncdiff.parallelize(pipe, **({"devices": ["cpu"] * 2} | options))


def test_waves_of_a_scheduler_that_calls_twice_a_step() -> None:
    pipe = reference.pipeline(SPEC)
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(SchedulerError, match=r"HeunDiscreteScheduler calls the denoiser 2 times"):
        asyncdiff.parallelize(pipe, devices=["cpu"] * 2, schedule="wavefront")
    assert "_asyncdiff" not in pipe.unet.__dict__


def test_a_scheduler_changed_to_one_that_calls_twice() -> None:
    pipe, handle = parallel(split="estimate", schedule="wavefront")
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(SchedulerError, match="2 times a step"):
        reference.run(pipe, SPEC)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    reference.run(pipe, SPEC)
    handle.restore()


def test_a_pipeline_that_calls_twice_a_step() -> None:
    pipe, handle = parallel(split=SPEC["split"])
    pipe.scheduler.set_timesteps(5)
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32)
    with pytest.raises(SchedulerError, match=r"more or less often than once .* branches="):
        for t in pipe.scheduler.timesteps:
            pipe.unet(sample, t, text)
            pipe.unet(sample, t, text)
    reference.run(pipe, SPEC)
    handle.restore()


def test_timesteps_from_nowhere() -> None:
    pipe, handle = parallel(split=SPEC["split"])
    pipe.scheduler.set_timesteps(5)
    with pytest.raises(SchedulerError, match="AsyncDenoiser"):
        pipe.unet(torch.randn(2, 4, 8, 8), torch.tensor(437), torch.randn(2, 7, 32))
    handle.restore()


def test_parallelised_twice_and_wrong_objects() -> None:
    pipe, handle = parallel()
    handle = asyncdiff.parallelize(pipe, devices=["cpu"] * 2)  # in the place of the first
    with pytest.raises(InputError, match="restore"):
        pipe.unet.to(torch.float16)
    with pytest.raises(InputError, match="nothing was captured"):
        _ = handle.partition
    with pytest.raises(InputError, match="no generation has finished"):
        handle.report()
    handle.restore()
    handle.restore()
    pipe.unet.to(torch.float32)
    with pytest.raises(InputError, match=r"neither \.unet nor \.transformer"):
        asyncdiff.parallelize(object(), devices=["cpu"] * 2)


def test_warmup_longer_than_the_pipeline_runs() -> None:
    pipe, handle = parallel(split=SPEC["split"], warmup=4)
    got = reference.run(pipe, SPEC, num_inference_steps=3)  # all of them are exact then
    assert handle.report().warmup == 3
    reference.run(pipe, SPEC, num_inference_steps=4)
    handle.restore()
    want = reference.run(pipe, SPEC, num_inference_steps=3)
    assert reference.distance(got, want) < 1e-3
