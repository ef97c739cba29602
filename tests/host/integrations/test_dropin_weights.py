"""Weights that are written to while a denoiser is spread over ranks: adapters that are swapped,
state dicts that are loaded, averages, other dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from tiny_pipelines import draw, tiny_sd, tiny_unet
from toys import toy

import asyncdiff
from asyncdiff import InputError
from asyncdiff.graph.weights import Weights
from asyncdiff.graph.writes import WeightWatch

STEPS = 4


def others() -> dict[str, torch.Tensor]:
    return tiny_unet(seed=1).state_dict()


def load_state_dict(unet: Any) -> None:
    unet.load_state_dict(others())


def load_and_assign(unet: Any) -> None:
    unet.load_state_dict(others(), assign=True)


def write_data(unet: Any) -> None:
    new = others()
    for name, weight in unet.named_parameters():
        weight.data.copy_(new[name])  # unseen by torch


def set_data(unet: Any) -> None:
    """As hot swaps of adapters end."""
    new = others()
    for name, weight in unet.named_parameters():
        weight.data = new[name]


def write_time(unet: Any) -> None:
    """What rows of timesteps are made of, and nothing else."""
    unet.time_embedding.linear_2.weight.data.mul_(3.0)


WRITES = [load_state_dict, load_and_assign, write_data, set_data, write_time]


@pytest.mark.parametrize("copied", [False, True])
def test_weights_that_are_written_to(copied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks share the weights where these lie on their device, and have copies otherwise."""
    if copied:
        monkeypatch.setattr(Weights, "_shared", staticmethod(lambda weight, device: False))
    (pipe, call), before = tiny_sd(), {k: w.clone() for k, w in tiny_unet().state_dict().items()}
    settings: dict[str, Any] = {"devices": ["cpu"] * 2, "warmup": STEPS, "split": "estimate"}
    with asyncdiff.parallelize(pipe, **settings) as handle:
        plain, _ = tiny_sd()
        old = draw(plain, call)
        assert reference.distance(draw(pipe, call), old) < 1e-5
        for write in WRITES:
            engine = handle.denoiser._engine
            for unet in (plain.unet, pipe.unet):
                write(unet)
            want = draw(plain, call)
            assert reference.distance(want, old) > 1e-3
            assert reference.distance(draw(pipe, call), want) < 1e-5, write.__name__
            assert handle.denoiser._engine is engine, write.__name__  # nothing is prepared again
            for unet in (plain.unet, pipe.unet):
                unet.load_state_dict(before)
            assert reference.distance(draw(pipe, call), old) < 1e-5, write.__name__


def test_weights_that_a_callback_writes_to() -> None:
    pipe, call = tiny_sd()
    plain, _ = tiny_sd()

    def write(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        if step == 1:
            write_data(pipe.unet)
        return kwargs

    want = draw(plain, call, callback_on_step_end=write)
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, warmup=STEPS, split="estimate"):
        assert reference.distance(draw(pipe, call, callback_on_step_end=write), want) < 1e-5


def test_what_a_watch_sees() -> None:
    module = toy()
    module.up[0].weight.data = module.up[0].weight.data.to(memory_format=torch.channels_last)
    module.register_buffer("wide", torch.ones(3, dtype=torch.complex128))
    module.register_buffer("small", torch.ones(9, 9, dtype=torch.bfloat16))
    module.register_buffer("whole", torch.ones((), dtype=torch.int64))
    module.register_buffer("odd", torch.full((3,), float("nan"))[::2])
    module.register_buffer("none", torch.empty(0))
    weights = [*module.parameters(), *module.buffers(), torch.empty(3, device="meta")]
    watch = WeightWatch(weights)
    assert not watch.changed()
    for weight in weights[:-2]:
        weight.data.add_(1) if not weight.isnan().any() else weight.data.zero_()
        assert watch.changed()
        watch = WeightWatch(weights)
        assert not watch.changed()
    weights[0][0, 0, 0, 0] += 1.0
    assert watch.changed()
    weights[-3].untyped_storage().resize_(1024)  # by who shards weights


def test_which_weights_were_written_to() -> None:
    """As far as torch counts; where a write is seen that it does not, it may have been any."""
    weights = [torch.zeros(20) for _ in range(3)]
    watch = WeightWatch(weights)
    assert watch.written() == set()
    weights[0] += 1.0
    weights[2].data = torch.ones(20)
    assert watch.written() == {id(weights[0]), id(weights[2])}
    weights[1].data += 1.0
    assert watch.written() is None


def test_dtypes_that_are_changed_are_refused() -> None:
    """Before anything else was converted, and in all the ways that torch has."""
    pipe, call = tiny_sd()
    want = draw(pipe, call)
    encoder = tiny_unet()  # any module
    pipe.register_modules(text_encoder=encoder)
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, warmup=STEPS, split="estimate"):
        for change in (
            lambda: pipe.to(torch.float16),
            lambda: pipe.to("cpu", torch.float16),
            lambda: pipe.to(dtype=torch.float16),
            lambda: pipe.unet.to(torch.float16),
            lambda: pipe.unet.half(),
            lambda: pipe.unet.bfloat16(),
            lambda: pipe.unet.double(),
        ):
            with pytest.raises(
                InputError, match=r"handle.restore\(\), change it to torch\..*again"
            ):
                change()
        assert encoder.dtype is torch.float32
        assert pipe.to(torch.float32).to("cpu") is pipe
        pipe.register_modules(text_encoder=None)
        assert pipe.unet.float().cpu() is pipe.unet
        assert reference.distance(draw(pipe, call), want) < 1e-5
    assert pipe.unet.half().dtype is torch.float16
