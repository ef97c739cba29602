"""Several calls of the denoiser in a step, each a branch with a history of its own: against the
same conditions in one batch, and against a denoiser for each."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from branched import STEPS, by_batch, by_branch, guided, scheduler
from toys import toy, toy_call

from asyncdiff import AsyncDenoiser, InputError
from asyncdiff.generation.spec import GenerationSpec
from asyncdiff.schedule.branch import Branch

CALL = toy_call(2)
LONGER = toy_call(1, seed=7)["encoder_hidden_states"].repeat(1, 2, 1)[:, :7]
SETTINGS: list[dict[str, Any]] = [
    {"components": 2, "warmup": 1},
    {"components": 3, "warmup": 2},
    {"components": 2, "stride": 2, "warmup": 1},
    {"components": 2, "warmup": 3, "exact_mode": "split"},
    {"components": 2, "warmup": 1, "guidance": "split"},
    {"components": 1, "warmup": 1, "guidance": "split"},
    {"components": 2, "warmup": 2, "schedule": "wavefront", "exact_tail": 1},
    {"components": 3, "warmup": 2, "schedule": "wavefront", "guidance": "split"},
    {"components": 2, "warmup": "auto"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_as_in_one_batch(settings: dict[str, Any]) -> None:
    texts = list(CALL["encoder_hidden_states"].chunk(2))
    with contextlib.closing(AsyncDenoiser(toy(), split="estimate", **settings)) as denoiser:
        expected = by_batch(denoiser, CALL)
        for said in (False, True):
            torch.testing.assert_close(
                by_branch(denoiser, CALL["sample"][:1], texts, said), expected
            )
        report = denoiser.report()
        assert report.branches == 2 and report.steps == STEPS
        assert "9 steps of 2 calls" in str(report)


def test_after_a_batch_whose_exact_steps_ran_split() -> None:
    """Its ranks for exact steps are at the same places, one group at each."""
    settings: dict[str, Any] = {"components": 2, "warmup": 1, "exact_mode": "split"}
    with contextlib.closing(AsyncDenoiser(toy(), split="estimate", **settings)) as denoiser:
        for branches in (1, 2):
            with denoiser.generation([900], branches=branches):
                for index in range(branches):
                    call = toy_call(batch=2 + 2 * index)
                    torch.testing.assert_close(denoiser(**call), denoiser.module(**call))


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[4], SETTINGS[6]], ids=str)
def test_prompts_of_other_lengths(settings: dict[str, Any]) -> None:
    """The same bits as with a denoiser for each."""
    texts = [CALL["encoder_hidden_states"][:1], LONGER]
    alone = {k: v for k, v in settings.items() if k != "guidance"}
    with contextlib.ExitStack() as stack:
        each = [
            stack.enter_context(contextlib.closing(AsyncDenoiser(toy(), split="estimate", **alone)))
            for _ in texts
        ]
        sampler, expected = scheduler(), CALL["sample"][:1]
        for denoiser in each:
            stack.enter_context(denoiser.generation(sampler.timesteps, sampler))
        for t in sampler.timesteps:
            noise = [d(expected, t, x)[0] for d, x in zip(each, texts, strict=True)]
            expected = sampler.step(guided(noise), t, expected).prev_sample
        together = stack.enter_context(
            contextlib.closing(AsyncDenoiser(toy(), split="estimate", **settings))
        )
        for _ in range(2):  # engines are there again
            assert torch.equal(by_branch(together, CALL["sample"][:1], texts, False), expected)
        assert len(together._engines) == 2


def test_weights_are_held_once() -> None:
    """Components of all branches are cut alike, whatever their shapes."""
    with contextlib.closing(AsyncDenoiser(toy(), components=2, split="estimate")) as denoiser:
        by_branch(denoiser, CALL["sample"][:1], [CALL["encoder_hidden_states"][:1], LONGER], False)
        kept = [e for p in denoiser._engines._kept.values() for e in p.engines]
        assert len({e.partition.cuts for e in kept}) == 1


def test_a_branch_that_was_left_out_goes_on_exactly() -> None:
    """Begun again for the steps that are left."""
    module = toy()
    texts = list(CALL["encoder_hidden_states"].chunk(2))
    sampler, latents = scheduler(), CALL["sample"][:1]
    with contextlib.closing(AsyncDenoiser(module, components=2, split="estimate")) as denoiser:
        spec = GenerationSpec.of(denoiser.config, sampler.timesteps)
        for index in range(2):
            denoiser.start(spec, branch=Branch(index, 2))
        for k, t in enumerate(sampler.timesteps):
            denoiser.call(denoiser.parse((latents, t, texts[0]), {}), 0)
            if k in (0, 1, 6, 7, 8):
                if k == 6:
                    rest = GenerationSpec.of(denoiser.config, sampler.timesteps[6:])
                    denoiser.start(rest, branch=Branch(1, 2))
                (noise,) = denoiser.call(denoiser.parse((latents, t, texts[1]), {}), 1)
                if k in (0, 6):
                    torch.testing.assert_close(noise, module(latents, t, texts[1])[0])
            latents = latents * 0.9
        denoiser.settle()
        assert denoiser.report().branches == 2
        denoiser.stop()


@pytest.mark.parametrize("branches", [0, -1, 1.5, "2"])
def test_numbers_of_branches_that_make_no_sense(branches: Any) -> None:
    refused = pytest.raises(InputError, match="number of calls in a step")
    with contextlib.closing(AsyncDenoiser(toy(), components=1)) as denoiser, refused:
        denoiser.generation([900], branches=branches).__enter__()


def test_a_generation_of_fewer_branches_inside_of_one_of_more() -> None:
    """It has nothing to do with those that are left of it."""
    call = CALL["sample"], torch.tensor(700), CALL["encoder_hidden_states"]
    with (
        contextlib.closing(AsyncDenoiser(toy(), components=1)) as denoiser,
        denoiser.generation([900, 800], branches=3),
        denoiser.generation([700], branches=2),
    ):
        for _ in range(2):
            denoiser(*call)
        with pytest.raises(InputError, match="no generation has steps left"):
            denoiser(*call)


def test_weights_of_another_layout_between_the_calls_of_the_only_step() -> None:
    """The first call's ranks are gone before they are waited for."""
    module, call = toy(), toy_call(1)
    with (
        contextlib.closing(AsyncDenoiser(module, split="estimate", components=2)) as denoiser,
        pytest.raises(InputError, match="between two calls of step 0"),
        denoiser.generation([900], branches=2),
    ):
        denoiser(**call)
        weight = module.up[0].weight
        other = weight.transpose(0, 1).contiguous().transpose(0, 1)
        module.up[0].weight = torch.nn.Parameter(other, requires_grad=False)
        denoiser(**call)


def test_too_many_calls() -> None:
    with contextlib.closing(AsyncDenoiser(toy(), components=1)) as denoiser:
        t = torch.tensor(900)
        with denoiser.generation([900], branches=2):
            for _ in range(2):
                denoiser(CALL["sample"], t, CALL["encoder_hidden_states"])
            with pytest.raises(InputError, match="no generation has steps left"):
                denoiser(CALL["sample"], t, CALL["encoder_hidden_states"])
