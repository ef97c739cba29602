"""The engine against a plain emulation of the algorithm, and its behaviour as a whole."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulation import generate
from toys import toy, toy_call

from asyncdiff import AsyncDenoiser, InputError, RankError
from asyncdiff.graph.capture import capture
from asyncdiff.graph.signature import parse
from asyncdiff.partition.ownership import by_modules

SPLITS = {
    1: [["enter", "down", "mix", "up", "leave"]],
    2: [["enter", "down"], ["mix", "up", "leave"]],
    3: [["enter", "down.0"], ["down.1", "down.2", "mix"], ["up", "leave"]],
    4: [["enter", "down.0"], ["down.1", "down.2"], ["mix", "up.0"], ["up.1", "up.2", "leave"]],
}
CIRCLE = [["down.1", "down.2", "mix"], ["enter", "down.0", "up", "leave"]]
TIMES = [torch.tensor(900 - 100 * k) for k in range(8)]


def sampler(latents: torch.Tensor, noise: torch.Tensor, k: int) -> torch.Tensor:
    return latents - (0.1 + 0.01 * k) * noise


def run(denoiser: AsyncDenoiser, call: dict[str, Any], times: list[torch.Tensor]) -> torch.Tensor:
    latents = call["sample"]
    with denoiser.generation(torch.stack(times)):
        for k, t in enumerate(times):
            (noise,) = denoiser(latents, t, encoder_hidden_states=call["encoder_hidden_states"])
            latents = sampler(latents, noise, k)
    return latents


def emulate(split: Any, stride: int, warmup: int, steps: int, shift: bool = False) -> torch.Tensor:
    module, kwargs = toy(), toy_call()
    call = parse(module, (), kwargs)
    captured = capture(module, call)
    return generate(
        captured,
        by_modules(captured, split),
        len(split),
        stride,
        warmup,
        TIMES[:steps],
        call,
        kwargs["sample"],
        sampler,
        shift,
    )


@pytest.mark.parametrize(
    ("components", "stride", "warmup", "steps", "shift"),
    [
        (1, 1, 1, 4, False),
        (2, 1, 1, 7, False),
        (2, 1, 2, 6, True),
        (2, 2, 1, 8, False),
        (2, 3, 2, 8, True),
        (3, 1, 1, 7, False),
        (3, 2, 1, 7, False),
        (4, 1, 3, 8, False),
        (4, 2, 2, 7, False),
        (1, 2, 1, 6, False),
    ],
)
def test_equals_the_emulation(
    components: int, stride: int, warmup: int, steps: int, shift: bool
) -> None:
    split = SPLITS[components]
    denoiser = AsyncDenoiser(
        toy(),
        devices=["cpu"] * (components + stride - 1),
        components=components,
        stride=stride,
        warmup=warmup,
        split=split,
        time_shift=shift,
    )
    got = run(denoiser, toy_call(), TIMES[:steps])
    want = emulate(split, stride, warmup, steps, shift)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    denoiser.close()


def test_a_circle_equals_the_emulation() -> None:
    denoiser = AsyncDenoiser(toy(), devices=["cpu"] * 2, split=CIRCLE)
    got = run(denoiser, toy_call(), TIMES)
    torch.testing.assert_close(got, emulate(CIRCLE, 1, 1, 8), rtol=1e-12, atol=1e-12)
    assert denoiser.partition.exact_order == (1, 0, 1)
    denoiser.close()


def test_repeats_and_changes_of_shape_dtype_and_length() -> None:
    """One denoiser serves them all; going back gives the first result again, bit for bit."""
    denoiser = AsyncDenoiser(toy(), devices=["cpu"] * 2, split=SPLITS[2])
    first = run(denoiser, toy_call(), TIMES)
    small = run(denoiser, toy_call(batch=1, size=4), TIMES[:5])
    assert small.shape == (1, 4, 4, 4)
    other = run(denoiser, toy_call(seed=7), TIMES[:3])
    assert torch.equal(run(denoiser, toy_call(), TIMES), first)
    assert torch.equal(run(denoiser, toy_call(seed=7), TIMES[:3]), other)
    for batch in range(3, 8):  # more shapes than are kept
        run(denoiser, toy_call(batch=batch), TIMES[:2])
    assert torch.equal(run(denoiser, toy_call(), TIMES), first)
    denoiser.close()


def test_what_ranks_had_is_free_without_the_collector() -> None:
    """Whoever still refers to an engine: GPUs would stay full until Python looks for cycles."""
    denoiser = AsyncDenoiser(toy(), devices=["cpu"] * 2, split=SPLITS[2])
    run(denoiser, toy_call(), TIMES)
    engine: Any = denoiser._engine
    had: list[Any] = []
    for worker in engine.workers:
        had += worker.program.held.values()
        had += [*worker.program.static.values(), *worker.program.kept]
        had += [t for bundle in worker.mailbox.values() for t in bundle]
    refs = [weakref.ref(x) for x in had]
    programs = [part for worker in engine.workers for part in worker.program._parts]
    assert len(refs) > 10 and any(list(part.buffers()) for part in programs)
    del had, worker
    gc.collect()
    gc.disable()
    try:
        denoiser.close()
        assert not [ref() for ref in refs if ref() is not None]
        assert not any(list(part.buffers()) for part in programs)
    finally:
        gc.enable()
    assert engine.closed


def test_the_plan_of_a_generation_like_the_one_before_is_known() -> None:
    denoiser = AsyncDenoiser(toy(), devices=["cpu"] * 2, components=2)
    plan = denoiser.plan(6)
    assert denoiser.plan(6) is plan and denoiser.plan(7) is not plan
    denoiser.configure(warmup=2)
    assert denoiser.plan(6).warmup == 2
    denoiser.configure(warmup=1)
    assert denoiser.plan(6) is plan


def test_conditioning_changed_in_place_is_seen() -> None:
    denoiser = AsyncDenoiser(toy(), devices=["cpu"] * 2, split=SPLITS[2])
    plain = toy()
    call = toy_call()
    text = call["encoder_hidden_states"]
    with denoiser.generation(torch.stack(TIMES[:1])):
        denoiser(call["sample"], TIMES[0], encoder_hidden_states=text)
    text.mul_(2)
    with denoiser.generation(torch.stack(TIMES[:1])):
        got = denoiser(call["sample"], TIMES[0], encoder_hidden_states=text)[0]
    torch.testing.assert_close(
        got, plain(call["sample"], TIMES[0], text)[0], rtol=1e-12, atol=1e-12
    )
    denoiser.close()


def test_concurrent_generations_take_turns() -> None:
    denoiser = AsyncDenoiser(toy(), devices=["cpu"] * 2, split=SPLITS[2])
    calls = [toy_call(seed=s) for s in range(4)]
    want = [run(denoiser, c, TIMES) for c in calls]
    got: list[torch.Tensor | None] = [None] * 4

    def work(i: int) -> None:
        got[i] = run(denoiser, calls[i], TIMES)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert all(g is not None and torch.equal(g, w) for g, w in zip(got, want, strict=True))
    denoiser.close()


def break_rank(denoiser: AsyncDenoiser, rank: int, at: int) -> Callable[[], None]:
    """Make ``rank`` raise in its ``at``-th run; returns what mends it."""
    worker = denoiser._engine.workers[rank]  # type: ignore[union-attr]
    count = itertools.count()
    sound = worker.run

    def run_(slots: Any) -> Any:
        if next(count) == at:
            raise RuntimeError("a cosmic ray")
        return sound(slots)

    worker.run = run_  # type: ignore[method-assign]

    def mend() -> None:
        worker.run = sound  # type: ignore[method-assign]

    return mend


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("at", [0, 3])
def test_a_rank_that_raises(rank: int, at: int) -> None:
    """The error names the rank, the others stop, and the next generation works."""
    denoiser = AsyncDenoiser(toy(), devices=["cpu"] * 3, components=3, split=SPLITS[3])
    want = run(denoiser, toy_call(), TIMES)
    mend = break_rank(denoiser, rank, at)
    with pytest.raises(RankError, match=f"rank {rank} .*cosmic ray") as caught:
        run(denoiser, toy_call(), TIMES)
    assert caught.value.rank == rank
    mend()
    assert torch.equal(run(denoiser, toy_call(), TIMES), want)
    denoiser.close()


def test_an_abandoned_generation() -> None:
    denoiser = AsyncDenoiser(toy(), devices=["cpu"] * 2, split=SPLITS[2])
    call = toy_call()
    want = run(denoiser, call, TIMES)
    with pytest.raises(KeyError), denoiser.generation(torch.stack(TIMES)):
        for _ in range(4):
            denoiser(call["sample"], TIMES[0], call["encoder_hidden_states"])
        raise KeyError
    assert torch.equal(run(denoiser, call, TIMES), want)
    denoiser.close()


def test_too_many_calls_and_changes_in_the_middle() -> None:
    denoiser = AsyncDenoiser(toy(), devices=["cpu"] * 2, split=SPLITS[2])
    call = toy_call()
    with pytest.raises(InputError, match="inside"):
        denoiser(**call)
    run(denoiser, call, TIMES)
    with denoiser.generation(torch.stack(TIMES[:2])):
        denoiser(**call)
        smaller = toy_call(batch=1)
        with pytest.raises(InputError, match=r"sample was \(2, 4, 8, 8\)"):
            denoiser(**smaller)
    run(denoiser, call, TIMES)
    denoiser.close()


def test_report_counts_what_was_exchanged() -> None:
    denoiser = AsyncDenoiser(
        toy(), devices=["cpu"] * 4, components=3, stride=2, warmup=2, split=SPLITS[3]
    )
    run(denoiser, toy_call(), TIMES)
    report = denoiser.report()
    assert (report.steps, report.ticks) == (8, 2 + 3)
    sizes = denoiser._engine.bundle_bytes(False)  # type: ignore[union-attr]
    # The last component's values go to its copy too.
    per_tick = sum(n * (2 if target == 2 else 1) for (_, target), n in sizes.items())
    assert report.exchange_bytes_per_tick == per_tick
    assert report.exchange_bytes == per_tick * report.ticks
    assert report.total_ms > 0 and report.exposed_ms is not None
    assert "8 steps in 5 ticks" in str(report)
    assert report.to_dict()["devices"] == ["cpu"] * 4
    denoiser.close()
