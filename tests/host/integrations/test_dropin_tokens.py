"""Pipelines of transformers whose devices share out a picture's tokens."""

from __future__ import annotations

import contextlib
import copy
import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES

import asyncdiff
from asyncdiff import AsyncDenoiser
from asyncdiff.integrations.auto import AutoSettings, exact_mode
from asyncdiff.integrations.diffusers.pipeline import plan_partition
from asyncdiff.partition.memory import of_module
from asyncdiff.partition.shards import Shards
from asyncdiff.quality import Task
from asyncdiff.runtime import devices
from asyncdiff.schedule.plan import build
from asyncdiff.schedule.simulate import Timing, predict


def _drawn(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    drawn: torch.Tensor = pipe(**call, generator=generator, output_type="latent")[0]
    return drawn


#: Of Klein KV ranks have programs of which one uses later what the other does not.
FAMILIES_BY_TOKENS = [
    ("FLUX", 2),
    ("FLUX.2 Klein KV", 2),
    *(
        pytest.param(name, devices, marks=pytest.mark.slow)
        for name in ("FLUX.2", "SD3", "Qwen-Image", "Wan 2.1", "LTX", "CogVideoX", "Hunyuan Video")
        for devices in (2, 4)
    ),
]


@pytest.mark.parametrize("name, devices", FAMILIES_BY_TOKENS)
def test_a_quality_takes_it_for_transformers_and_the_picture_is_the_plain_one(
    name: str, devices: int
) -> None:
    pipe, call = FAMILIES[name]()
    call = {**call, "num_inference_steps": 2}
    call.pop("output_type", None)
    plain = _drawn(pipe, call)
    with asyncdiff.parallelize(pipe, devices=["cpu"] * devices, quality="exact") as handle:
        drawn = _drawn(pipe, call)
        if name.startswith("FLUX"):  # without conditions to split
            assert "schedule='sequence'" in handle.settings and "tokens" in handle.settings
            assert handle.report().devices == ["cpu"] * devices
        assert len(handle.report().devices) > 1
    torch.testing.assert_close(drawn, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))


def test_the_default_takes_it_for_large_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = FAMILIES["FLUX"]()
    call = {**call, "num_inference_steps": 12}
    call.pop("output_type", None)
    plain = _drawn(pipe, call)
    monkeypatch.setattr("asyncdiff.integrations.auto._LARGE", plain.numel())
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2) as handle:
        drawn = _drawn(pipe, call)
        assert "schedule='sequence'" in handle.settings and "hardly longer" in handle.settings
        torch.testing.assert_close(drawn, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))
        handle.configure(warmup=3)  # which is of waves
        _drawn(pipe, call)
        assert "warmup=3" in handle.settings
    monkeypatch.setattr("asyncdiff.integrations.auto._LARGE", plain.numel() + 1)
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2) as handle:
        _drawn(pipe, call)
        assert "schedule='wavefront'" in handle.settings
    # Of two conditions each has a device, in a UNet, too: a batch has the latents of both.
    pipe, call = FAMILIES["SD 1.5"]()
    call = {**call, "num_inference_steps": 12}
    call.pop("output_type", None)
    plain = _drawn(pipe, call)
    for more, said in ((0, "guidance='split'"), (1, "schedule='wavefront'")):
        monkeypatch.setattr("asyncdiff.integrations.auto._LARGE", plain.numel() + more)
        with asyncdiff.parallelize(pipe, devices=["cpu"] * 2) as handle:
            _drawn(pipe, call)
            assert said in handle.settings


def test_another_setting_is_picked_where_tokens_cannot_be_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("asyncdiff.integrations.auto.is_transformer", lambda _: True)
    pipe, call = FAMILIES["SD 1.5"]()
    call.pop("output_type", None)
    call["guidance_scale"] = 1.0
    plain = _drawn(pipe, call)
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, quality="exact") as handle:
        assert torch.equal(_drawn(pipe, call), plain)
        assert "one device" in handle.settings


def test_how_exact_steps_run_is_picked() -> None:
    by_hand: dict[str, Any] = {"components": 2, "warmup": 2, "exact_mode": "auto"}
    pipe, call = FAMILIES["FLUX"]()
    call.pop("output_type", None)
    plain = _drawn(pipe, call | {"num_inference_steps": 2})
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, **by_hand) as handle:
        assert handle.settings == 'exact_mode="auto" picks at the first call'
        drawn = _drawn(pipe, call | {"num_inference_steps": 2})
        assert "exact_mode='sequence'" in handle.settings and handle.config.components == 2
        torch.testing.assert_close(drawn, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))
        handle.configure(exact_mode="chain")
        handle.configure(warmup=1)
        _drawn(pipe, call)
        assert (handle.config.exact_mode, handle.config.warmup) == ("chain", 1)
        handle.configure(exact_mode="auto")
        _drawn(pipe, call)
        assert handle.config.exact_mode == "sequence"
    pipe, call = FAMILIES["SD 1.5"]()  # no transformer: two conditions
    call.pop("output_type", None)
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, **by_hand) as handle:
        _drawn(pipe, call)
        assert "exact_mode='split'" in handle.settings
        _drawn(pipe, call | {"guidance_scale": 1.0})
        assert "exact_mode='chain'" in handle.settings
        with pytest.raises(asyncdiff.InputError, match="of an AsyncDenoiser write"):
            handle.denoiser.configure(exact_mode="auto")


#: In which tiny FLUX has room in two components, and its weights alone as a whole.
LITTLE = "700KiB"


def _flux(steps: int = 2) -> tuple[Any, dict[str, Any], torch.Tensor]:
    """A pipeline, its call, and what that draws plainly."""
    pipe, call = FAMILIES["FLUX"]()
    call = {**call, "num_inference_steps": steps}
    call.pop("output_type", None)
    return pipe, call, _drawn(pipe, call)


@pytest.mark.parametrize(
    "settings",
    [{"quality": "exact"}, {"components": 2, "warmup": 2, "exact_mode": "auto"}],
    ids=["quality", "exact_mode"],
)
def test_where_only_components_have_room(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    pipe, call, plain = _flux()
    with (
        caplog.at_level(logging.WARNING, "asyncdiff"),
        asyncdiff.parallelize(pipe, devices=["cpu"] * 2, memory=LITTLE, **settings) as handle,
    ):
        for _ in range(2):
            torch.testing.assert_close(_drawn(pipe, call), plain)
        assert (handle.config.components, handle.config.exact_mode) == (2, "chain")
        assert handle.config.schedule == "asyncdiff"
        assert "not each device has room for" in handle.settings
        assert "\n" not in handle.settings
    assert caplog.text.count("settings are picked once more") == 1


def test_what_is_asked_for_by_name_has_room_or_raises() -> None:
    pipe, call, _ = _flux()
    by_hand: dict[str, Any] = {
        "components": 2,
        "warmup": 2,
        "memory": LITTLE,
        "devices": ["cpu"] * 2,
    }
    with (
        asyncdiff.parallelize(pipe, **by_hand, exact_mode="sequence"),
        pytest.raises(asyncdiff.MemoryLimitError, match="that they may take"),
    ):
        _drawn(pipe, call)
    with asyncdiff.parallelize(pipe, **by_hand, exact_mode="auto") as handle:
        handle.configure(exact_mode="sequence")
        with pytest.raises(asyncdiff.MemoryLimitError, match="that they may take"):
            _drawn(pipe, call)


def test_what_is_free_counts_for_denoisers_to_come_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if CPUs had limits."""
    pipe, call, _ = _flux(1)
    size = of_module(pipe.transformer)
    for free, picked in ((size / 0.7, "sequence"), (size / 0.8, "chain")):
        # What the denoiser has there itself counts as free.
        monkeypatch.setattr(devices, "room_on", lambda _, free=free: int(free) - size)
        with asyncdiff.parallelize(
            pipe, devices=["cpu"] * 2, components=2, exact_mode="auto"
        ) as handle:
            _drawn(pipe, call)
            assert handle.config.exact_mode == picked
            assert ("room" in handle.settings) == (picked == "chain")
    any_call: Any = SimpleNamespace(signature="of a call")
    # A denoiser of the same size that has no ranks yet.
    beside = AsyncDenoiser(copy.deepcopy(pipe.transformer), devices=["cpu"], components=1)
    for factor, room in ((1.3, False), (1.4, True)):
        monkeypatch.setattr(devices, "room_on", lambda _, f=factor: int(2 * size * (f - 1)))
        alone = AsyncDenoiser(pipe.transformer, devices=["cpu"], components=1)
        with contextlib.closing(alone):
            auto = AutoSettings("exact", [torch.device("cpu")], alone.config, [0], [beside])
            assert auto._has_room(alone, any_call) == room


def test_as_many_components_as_devices_share_out_tokens() -> None:
    of = asyncdiff.ParallelConfig.of
    cpus = {"devices": ["cpu"] * 4, "schedule": "sequence"}
    assert of(None, cpus).components == 4
    assert of(None, cpus | {"guidance": "split"}).components == 2
    assert of(None, cpus | {"components": 3}).components == 3
    # Those of other processes are not known, and others have their own default.
    assert of(None, cpus, "env").components == 2
    assert of(None, {"devices": ["cpu"] * 4}).components == 2
    assert of(asyncdiff.ParallelConfig(), cpus).components == 2
    pipe, call, plain = _flux()
    for count in (3, 1):
        with asyncdiff.parallelize(pipe, devices=["cpu"] * count, schedule="sequence") as handle:
            torch.testing.assert_close(_drawn(pipe, call), plain)
            assert len(handle.denoiser.devices) == count


@pytest.mark.slow
def test_conditions_in_calls_of_their_own_with_masks() -> None:
    """Lumina 2 is prepared for each mask, and no batch has to be cut."""
    pipe, call = FAMILIES["Lumina 2"]()
    call = {**call, "num_inference_steps": 2}
    call.pop("output_type", None)
    plain = _drawn(pipe, call)
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, quality="exact") as handle:
        for _ in range(2):
            torch.testing.assert_close(_drawn(pipe, call), plain)
            assert "guidance='split'" in handle.settings


TASK = Task(devices=4, steps=50, step=0.1, guided=True, pictures=1, whole=True, tokens=True)


@pytest.mark.parametrize(
    "picked, task, settings",
    [
        ("sequence", {}, {"components": 4}),
        ("split", {}, {"components": 2}),
        ("sequence", {}, {"components": 2, "guidance": "split"}),
        ("split", {"tokens": False}, {"components": 4}),
        ("sequence", {"guided": False}, {"components": 2}),
        ("chain", {"tokens": False, "whole": False}, {"components": 4}),
        ("chain", {}, {"components": 4, "warmup": "auto"}),
        ("chain", {}, {"components": 4, "schedule": "sequence"}),
    ],
)
def test_what_is_picked(picked: str, task: dict[str, Any], settings: dict[str, Any]) -> None:
    config = asyncdiff.ParallelConfig(**settings, exact_mode="auto")
    assert exact_mode(replace(TASK, **task), config).settings == {"exact_mode": picked}


def test_a_plan_of_shares() -> None:
    """What a rank computes of a step, not what a component would."""
    pipe, _ = FAMILIES["FLUX"]()
    parts = plan_partition(pipe, 2, tokens=True, height=64, width=64)
    report = parts.report()
    assert not report.boundaries and "measured" in report.source
    assert report.whole_ms is not None
    slowest = max(c.ms for c in report.components)
    assert report.whole_ms / 2 < slowest < report.whole_ms
    found = predict(build(2, steps=4, schedule="sequence"), Timing.from_report(report.to_dict()))
    assert found.total_ms == pytest.approx(4 * slowest)
    assert found.speedup == pytest.approx(report.whole_ms / slowest)
    unet, _ = FAMILIES["SD 1.5"]()
    with pytest.raises(asyncdiff.TokensError):
        plan_partition(unet, 2, tokens=True, height=64, width=64)


def test_a_plan_of_shares_by_speed_and_within_memory() -> None:
    """As engines have them: what is said of cards that are not used counts for nothing."""
    pipe, _ = FAMILIES["FLUX"]()
    sizes = {"measure": False, "tokens": True, "height": 128, "width": 128}
    parts = plan_partition(pipe, 2, speeds=[1, 0.25, 9], memory=["1GB", "1GB", 1], **sizes)
    assert isinstance(parts, Shards)
    report = parts.report()
    assert report.speeds == [1.0, 0.25] and "1 at 25 %" in str(report)
    assert report.components[0].macs > 2 * report.components[1].macs
    with pytest.raises(asyncdiff.InputError, match="speeds has 1 entries"):
        plan_partition(pipe, 2, speeds=[1], **sizes)
    with pytest.raises(asyncdiff.MemoryLimitError, match=r"component 1 .* of 0\.5 MB"):
        plan_partition(pipe, 2, memory=["1GB", "500kB"], **sizes)


@pytest.mark.slow
def test_neither_tokens_nor_conditions_can_be_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mochi is prepared for each mask, as it is."""
    monkeypatch.setattr("asyncdiff.integrations.auto.is_transformer", lambda _: True)
    pipe, call = FAMILIES["Mochi"]()
    plain = _drawn(pipe, call | {"num_inference_steps": 2})
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, quality="exact") as handle:
        for _ in range(2):
            drawn = _drawn(pipe, call | {"num_inference_steps": 2})
            assert "one device" in handle.settings
            far = 1e-5 * float(plain.abs().max())
            torch.testing.assert_close(drawn, plain, rtol=0, atol=far)
