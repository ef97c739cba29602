"""What a quality means: which settings are picked for which task."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from asyncdiff.config import ParallelConfig
from asyncdiff.errors import InputError
from asyncdiff.quality import (
    FEW,
    LARGE_STEP,
    QUALITIES,
    SMALL_STEP,
    Task,
    check_quality,
    exact_steps,
    pick,
)

#: Stable Diffusion with 50 steps of DDIM on two devices.
USUAL = Task(devices=2, steps=50, step=0.1, guided=True, pictures=1, whole=True)


def picked(quality: str = "balanced", **changes: Any) -> dict[str, Any]:
    choice = pick(quality, replace(USUAL, **changes))
    used = choice.settings
    config = ParallelConfig(**used, devices=["cpu"] * choice.devices)  # which is checked
    groups = 2 if config.guidance == "split" else 1
    assert choice.devices == groups * config.ranks
    assert choice.devices <= changes.get("devices", 2)
    return used


def test_two_devices_with_guidance() -> None:
    for quality in ("high", "balanced", "fast"):
        used = picked(quality)
        assert (used["components"], used["schedule"]) == (2, "wavefront")
        assert used["exact_mode"] == "split"
    assert picked("exact") == {"components": 1, "guidance": "split"}


def test_better_is_never_less_exact() -> None:
    for components in (2, 3, 4):
        for step in (0.05, 0.15, 0.4):
            for steps in (10, 25, 28, 50, 100):
                for shared in (True, False):
                    exact = [
                        exact_steps(quality, steps, step, components, shared)
                        for quality in ("fast", "balanced", "high")
                    ]
                    assert exact == sorted(exact)
                    assert exact[0][0] >= 1
                    assert sum(exact[-1]) <= steps


def test_large_steps_and_many_components_take_more_exact_ones() -> None:
    for quality in ("fast", "balanced", "high"):
        for shared in (True, False):
            small, large = (
                exact_steps(quality, 100, s, 2, shared)[0] for s in (SMALL_STEP, LARGE_STEP)
            )
            assert small < large
            assert exact_steps(quality, 100, SMALL_STEP, 4, shared)[0] > small
        apart, one_by_one = (exact_steps(quality, 100, LARGE_STEP, 2, s)[0] for s in (True, False))
        assert apart > one_by_one  # where they cost less


def test_samplers_that_remember_have_more_exact_steps_at_the_end() -> None:
    for quality, tail in (("fast", 1), ("balanced", 1), ("high", 2)):
        assert picked(quality)["exact_tail"] == tail
        assert picked(quality, remembered=3)["exact_tail"] == 3
    few = picked(steps=FEW, step=LARGE_STEP, remembered=5)
    assert few["warmup"] + few["exact_tail"] < FEW


def test_four_devices() -> None:
    used = picked(devices=4)
    assert (used["components"], used["guidance"], used["exact_mode"]) == (2, "split", "chain")
    used = picked(devices=4, guided=False)
    assert (used["components"], used["guidance"]) == (4, "batched")
    assert picked(devices=5)["components"] == 2  # one is left over
    assert picked(devices=3)["components"] == 3


def test_few_steps_are_exact() -> None:
    for steps in range(1, FEW):
        assert picked(steps=steps) == {"components": 1, "guidance": "split"}
        assert picked(steps=steps, guided=False) == {"components": 1}
    waves = pick("balanced", USUAL)
    for guided in (True, False):
        task = replace(USUAL, steps=4, guided=guided)
        kept = pick("balanced", task, waves.settings).settings
        assert kept["components"] == 2  # what there is is not made anew
        assert kept["warmup"] == 4
        assert kept["exact_mode"] == ("split" if guided else "chain")


def test_several_pictures_are_drawn_in_turn() -> None:
    for quality in QUALITIES:
        assert picked(quality, pictures=2) == {"components": 2, "schedule": "pipeline"}
        assert picked(quality, pictures=3, devices=4).get("schedule") != "pipeline"


def test_samplers_that_waves_do_not_know_are_exact() -> None:
    assert picked(step="it is another") == {"components": 1, "guidance": "split"}
    assert picked(step="it is another", guided=False) == {"components": 1}


def test_a_denoiser_that_no_device_has_room_for() -> None:
    assert picked("exact", whole=False, devices=3) == {"components": 3, "warmup": 50}
    assert picked(whole=False)["exact_mode"] == "chain"


def test_one_device_is_the_plain_pipeline() -> None:
    assert picked(devices=1) == {"components": 1}


def test_what_was_picked_is_said() -> None:
    said = str(pick("balanced", USUAL))
    assert "components=2, schedule='wavefront', warmup=" in said
    assert "a condition on each of two devices" in said
    for task in (
        replace(USUAL, steps=4),
        replace(USUAL, step="it is another"),
        replace(USUAL, pictures=4),
    ):
        assert "exact" in pick("balanced", task).why
    with pytest.raises(InputError, match=r"quality='best': write one of exact, high, balanced"):
        check_quality("best")


def test_devices_share_out_tokens_where_steps_are_exact() -> None:
    tokens: dict[str, Any] = {"tokens": True, "guided": False}
    by_tokens = {"components": 2, "schedule": "sequence"}
    assert picked("exact", **tokens) == by_tokens
    assert picked("balanced", **tokens, steps=4) == by_tokens
    assert "tokens" in pick("exact", replace(USUAL, **tokens)).why
    # With guidance two devices take a condition each: nothing has to be exchanged.
    assert picked("exact", tokens=True) == {"components": 1, "guidance": "split"}
    four = picked("exact", tokens=True, devices=4)
    assert four == {"components": 2, "schedule": "sequence", "guidance": "split"}
    assert picked("exact", tokens=True, devices=3) == {"components": 3, "schedule": "sequence"}


def test_large_latents_are_exact_on_two_devices_for_each_condition() -> None:
    large: dict[str, Any] = {"large": True}
    tokens: dict[str, Any] = {"large": True, "tokens": True}
    by_tokens = {"components": 2, "schedule": "sequence"}
    for quality in ("high", "balanced"):
        for task in (large, tokens):
            assert picked(quality, **task) == {"components": 1, "guidance": "split"}
        assert picked(quality, **tokens, guided=False) == by_tokens
        assert picked(quality, **tokens, devices=4) == {**by_tokens, "guidance": "split"}
    assert "hardly longer" in pick("balanced", replace(USUAL, **large)).why
    waves: tuple[tuple[str, dict[str, Any]], ...] = (
        ("fast", tokens),
        ("balanced", {**tokens, "large": False}),
        ("balanced", {**tokens, "guided": False, "devices": 3}),
        ("balanced", {**tokens, "guided": False, "devices": 4}),
        ("balanced", {**tokens, "devices": 3}),
        ("balanced", {**tokens, "devices": 5}),
        ("balanced", {**large, "devices": 4}),  # a UNet, or slow links
        ("balanced", {**large, "guided": False}),
        ("balanced", {**large, "whole": False}),  # no room
    )
    for quality, task in waves:
        assert picked(quality, **task)["schedule"] == "wavefront", task
    # Who gives settings of waves means waves.
    by_hand = pick("balanced", replace(USUAL, **tokens), given={"warmup": 9}).settings
    assert (by_hand["schedule"], by_hand["warmup"]) == ("wavefront", 9)


def test_many_exact_steps_of_waves_share_out_tokens() -> None:
    for guided, devices, mode in (
        (False, 2, "sequence"),
        (True, 2, "split"),
        (True, 4, "sequence"),
    ):
        used = picked("high", tokens=True, guided=guided, devices=devices, step=LARGE_STEP)
        assert (used["schedule"], used["exact_mode"]) == ("wavefront", mode)
    few = picked("fast", tokens=True, guided=False)
    assert few["warmup"] < 5 and few["exact_mode"] == "chain"
    # All exact on ranks that are there already, if those share out tokens.
    task = replace(USUAL, tokens=True, guided=False, steps=4)
    made = pick("high", replace(task, steps=50, step=LARGE_STEP))
    assert pick("high", task, made.settings).settings["schedule"] == "wavefront"
    assert pick("high", task, {**made.settings, "exact_mode": "chain"}).settings == {
        "components": 2, "schedule": "sequence"
    }  # fmt: skip
