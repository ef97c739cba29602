"""Pipelines that call their denoiser several times a step, in strange ways."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from rotation import often
from tiny_pipelines import tiny_unet
from toys import Toy

import asyncdiff
from asyncdiff.errors import MemoryLimitError
from asyncdiff.graph.signature import Call
from asyncdiff.integrations.diffusers.timesteps import TimestepTracker
from asyncdiff.partition.partition import Partition
from asyncdiff.runtime.cutting.cutter import Cutter
from asyncdiff.runtime.worker import Worker
from asyncdiff.spread import Spread

STEPS = 8
#: Which texts are called with in a step, in order.
Order = Callable[[int], list[int]]


def both(k: int) -> list[int]:
    return [0, 1]


def small() -> Toy:
    torch.manual_seed(0)
    return Toy().eval().requires_grad_(False)


class Guided:
    """A pipeline whose steps call the denoiser as ``order`` says."""

    def __init__(self, unet: bool = False) -> None:
        self.unet: Any = tiny_unet() if unet else small()
        self.scheduler = diffusers.DDIMScheduler(clip_sample=False)
        generator, width = torch.Generator().manual_seed(3), 32 if unet else 6
        self.texts = [torch.randn(1, n, width, generator=generator) for n in (8, 8, 5)]

    @torch.no_grad()
    def __call__(
        self,
        order: Order = both,
        batch: int = 1,
        fresh: bool = False,
        time: Callable[[torch.Tensor], torch.Tensor] = lambda t: t,
        callback: Any = None,
    ) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(batch, 4, 8, 8, generator=generator)
        texts = [t.expand(batch, -1, -1) for t in self.texts]
        self.scheduler.set_timesteps(STEPS)
        for k, t in enumerate(self.scheduler.timesteps):
            noise = {}
            for i in order(k):
                text = texts[i].clone() if fresh else texts[i]
                noise[i] = self.unet(latents, time(t), text)[0]
            total = noise.get(0, torch.zeros(()))
            for i in sorted(set(noise) - {0}):
                total = total + 2.0 * i * (noise[i] - noise.get(0, torch.zeros(())))
            latents = self.scheduler.step(total, t, latents).prev_sample
            if callback is not None:
                texts = callback(k, texts)
        return latents


def spread(pipe: Any, **settings: Any) -> Any:
    return asyncdiff.parallelize(
        pipe, devices=["cpu"] * 2, split="estimate", **{"components": 2, "warmup": 1} | settings
    )


ORDERS: dict[str, Order] = {
    "both": both,
    "swapped": lambda k: [0, 1] if k % 3 else [1, 0],
    "ends early": lambda k: [0, 1] if k < 4 else [0],
    "begins late": lambda k: [0] if k < 3 else [0, 1],
    "the first one ends": lambda k: [0, 1] if k < 4 else [1],
    "a third one": lambda k: [0, 1, 2],
    "a third one, in some steps": lambda k: [0, 1, 2] if 1 < k < 5 else [0, 1],
    "every second step": lambda k: [0, 1] if k % 2 else [0],
    "in turns": lambda k: [k % 2],
}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("guidance", ["batched", "split"])
def test_any_order_is_exact_where_all_steps_are(name: str, guidance: str) -> None:
    pipe = Guided()
    want = pipe(order=ORDERS[name])
    components = 1 if guidance == "split" else 2
    if guidance == "split" and len(ORDERS[name](0)) == 1:
        refused = pytest.raises(asyncdiff.BatchError, match="this call has a batch of 1")
        with spread(pipe, components=1, guidance="split"), refused:
            pipe(order=ORDERS[name])
        return
    with spread(pipe, components=components, warmup=99, guidance=guidance):
        for _ in range(2):
            torch.testing.assert_close(pipe(order=ORDERS[name]), want)
    assert torch.equal(pipe(order=ORDERS[name]), want)


@pytest.mark.parametrize("schedule", ["asyncdiff", "wavefront"])
def test_branches_that_swap_places_keep_their_history(schedule: str) -> None:
    pipe = Guided()
    with spread(pipe, schedule=schedule):
        want = pipe()
        assert torch.equal(pipe(order=ORDERS["swapped"]), want)
        assert torch.equal(pipe(), want)


@pytest.mark.parametrize("name", ORDERS)
def test_asynchronous_steps_are_near(name: str) -> None:
    pipe = Guided()
    want = pipe(order=ORDERS[name])
    with spread(pipe) as handle:
        got = pipe(order=ORDERS[name])
        assert float((got - want).norm() / want.norm()) < 0.5
        assert handle.report().steps == STEPS or name in ("begins late", "in turns")


def test_conditioning_that_is_made_anew_in_every_step() -> None:
    """Told by order then."""
    pipe = Guided()
    with spread(pipe):
        torch.testing.assert_close(pipe(fresh=True), pipe())


@pytest.mark.parametrize("quality", [None, "exact"])
def test_times_that_are_made_in_a_way_that_is_not_known(quality: str | None) -> None:
    """Steps go by the order of calls then."""
    pipe = Guided()
    given = {"time": lambda t: torch.log(t + 1.0) * 50}
    want = pipe(**given)
    settings = {"warmup": 99} if quality is None else {"quality": quality}
    with asyncdiff.parallelize(
        pipe,
        devices=["cpu"] * 2,
        split="estimate",
        **settings,  # type: ignore[arg-type]
    ) as handle:
        torch.testing.assert_close(pipe(**given), want)
        assert handle.report().steps == STEPS and handle.report().branches == 2
    for ahead in ({"schedule": "wavefront"}, {"time_shift": True}):
        refused = pytest.raises(asyncdiff.SchedulerError, match="in a way that is not known")
        with spread(pipe, **ahead), refused:
            pipe(**given)


def test_a_batch_that_changes_between_calls() -> None:
    pipe = Guided()
    plain = {n: pipe(batch=n) for n in (1, 2)}
    with spread(pipe, warmup=99):
        for n in (1, 2, 1, 2):
            torch.testing.assert_close(pipe(batch=n), plain[n])


def test_a_callback_that_raises_or_changes_the_texts() -> None:
    pipe = Guided()

    def changes(k: int, texts: list[torch.Tensor]) -> list[torch.Tensor]:
        return [t * 0.5 for t in texts] if k == 3 else texts

    def raises(k: int, texts: list[torch.Tensor]) -> list[torch.Tensor]:
        if k == 3:
            raise ValueError("enough")
        return texts

    want, changed = pipe(), pipe(callback=changes)
    with spread(pipe, warmup=99):
        for _ in range(2):
            with pytest.raises(ValueError, match="enough"):
                pipe(callback=raises)
            torch.testing.assert_close(pipe(callback=changes), changed)
            torch.testing.assert_close(pipe(), want)


def test_two_pipelines_that_share_a_denoiser() -> None:
    first, second = Guided(), Guided()
    second.unet = first.unet
    want = first()
    with spread(first, warmup=99):
        torch.testing.assert_close(first(), want)
        with pytest.raises(asyncdiff.InputError, match="shares its denoiser"):
            spread(second)
    torch.testing.assert_close(second(), want)


def test_a_quality_learns_how_many_calls_there_are() -> None:
    """The code does not tell; the second generation knows."""
    pipe = Guided()
    want = pipe()
    with asyncdiff.parallelize(
        pipe, devices=["cpu"] * 2, split="estimate", quality="exact"
    ) as handle:
        for split in (False, True):
            torch.testing.assert_close(pipe(), want)
            assert ("guidance='split'" in handle.settings) == split


def test_a_condition_that_has_no_room_where_the_other_one_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other one, which had its first step already, goes on with the new settings."""
    pipe, first = Guided(), Cutter.first

    def refused(cutter: Cutter, call: Call, components: int, *args: Any) -> Partition:
        if components == 1 and any(t.shape[1:] == (5, 6) for t in call.tensors):
            raise MemoryLimitError("for long texts there is room")
        return first(cutter, call, components, *args)

    monkeypatch.setattr(Cutter, "first", refused)
    want = pipe(order=lambda k: [0, 2])
    with asyncdiff.parallelize(
        pipe, devices=["cpu"] * 2, split="estimate", quality="exact"
    ) as handle:
        for _ in range(3):
            torch.testing.assert_close(pipe(order=lambda k: [0, 2]), want)
        assert "one component after another" in handle.settings


def test_a_quality_does_without_a_split_that_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, engine_for = Guided(), Spread._engine_for

    def refused(spread: Spread, *args: Any, **options: Any) -> Any:
        if spread.config.splits:
            raise asyncdiff.BatchError("not with these masks")
        return engine_for(spread, *args, **options)

    monkeypatch.setattr(Spread, "_engine_for", refused)
    want = pipe()
    with asyncdiff.parallelize(
        pipe, devices=["cpu"] * 2, split="estimate", quality="exact"
    ) as handle:
        for _ in range(3):
            torch.testing.assert_close(pipe(), want)
            assert "one device" in handle.settings


def test_weights_that_lie_elsewhere_for_calls_of_two_shapes() -> None:
    """Those of one kind, whose ranks are made anew, are not taken for those of the other."""
    pipe = Guided()
    orders: list[Order] = [lambda k: [0], lambda k: [2]]
    with spread(pipe, warmup=99):
        for order in orders:
            pipe(order=order)
        scale(pipe.unet, 1.3, True)
        got = [pipe(order=order) for order in orders]
    for order, noise in zip(orders, got, strict=True):
        torch.testing.assert_close(noise, pipe(order=order))


def test_a_step_of_the_scheduler_that_a_callback_replaces_stays() -> None:
    pipe = Guided()

    def step(*args: Any, **kwargs: Any) -> Any:
        return type(pipe.scheduler).step(pipe.scheduler, *args, **kwargs)

    def replaces(k: int, texts: list[torch.Tensor]) -> list[torch.Tensor]:
        if k == 3:
            pipe.scheduler.step = step
        return texts

    want = pipe()
    with spread(pipe, warmup=99):
        torch.testing.assert_close(pipe(callback=replaces), want)
        assert pipe.scheduler.step is step
        torch.testing.assert_close(pipe(), want)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_the_scheduler_takes_steps_of_its_own(copied: Any) -> None:
    """And is counted with the original; afterwards nothing is left on either."""
    pipe, copies = Guided(), []

    def swaps(k: int, texts: list[torch.Tensor]) -> list[torch.Tensor]:
        if k == 2:
            pipe.scheduler.mark = 1
            copies.append(copied(pipe.scheduler))
            copies[0].mark = 2
            noise = torch.ones(1, 4, 8, 8)
            copies[0].step(noise, copies[0].timesteps[2], noise)
            assert type(copies[0]) is type(pipe.scheduler)
            assert copies[0].step.scheduler is copies[0] and pipe.scheduler.mark == 1
        return texts

    want = pipe()
    with spread(pipe, warmup=99):
        torch.testing.assert_close(pipe(), want)
        pipe(callback=swaps)
        torch.testing.assert_close(pipe(), want)
    for scheduler in (pipe.scheduler, *copies):
        assert {"step", "__reduce_ex__", "__setstate__"}.isdisjoint(vars(scheduler))


class InTheMiddle(Guided):
    """Two denoisers, and a beginning in the middle, as in image to image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.unet_2: Any = Toy().eval().requires_grad_(False)
        self.config = SimpleNamespace(boundary_ratio=0.4)

    @torch.no_grad()
    def __call__(self, begin: int = 3) -> torch.Tensor:
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        self.scheduler.set_timesteps(10)
        times = self.scheduler.timesteps[begin:]
        self.num_timesteps = len(times)
        for t in times:
            denoiser = self.unet if t >= 400 else self.unet_2
            noise = denoiser(latents, t, self.texts[0])[0]
            latents = self.scheduler.step(noise, t, latents).prev_sample
        return latents


def test_two_denoisers_and_a_beginning_in_the_middle() -> None:
    """Each has exact steps at its own beginning and end."""
    pipe = InTheMiddle()
    want = {begin: pipe(begin) for begin in (0, 3, 7)}
    with spread(pipe, warmup=1, exact_tail=1) as handle:
        for begin, each in ((0, [6, 4]), (3, [3, 4]), (7, [3])):
            pipe(begin)
            steps = [c.report.steps for c in handle._calls if c.report]
            assert steps == each
    with spread(pipe, warmup=99):
        for begin, latents in want.items():
            torch.testing.assert_close(pipe(begin), latents)


@pytest.mark.parametrize("replaced", [False, True])
def test_times_are_not_looked_at_where_the_scheduler_is_known_to_step(
    replaced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the host would wait for the first branch, before the second one begins. A step that
    somebody put in the place of the scheduler's is not counted."""
    looks, has = [], TimestepTracker.has
    monkeypatch.setattr(TimestepTracker, "has", lambda *a: looks.append(1) or has(*a))
    plain, pipe = Guided(), Guided()
    want = plain(time=lambda t: t / 1000)
    with spread(pipe, warmup=99):
        for looked in (1, 1 if replaced else 0):
            looks.clear()
            torch.testing.assert_close(pipe(time=lambda t: t / 1000), want)
            assert (len(looks) > 0) == bool(looked)
            if replaced:
                pipe.scheduler.step = partial(pipe.scheduler.step)


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("at", [0, 3])
def test_weights_that_move_between_two_calls_of_a_step(elsewhere: bool, at: int) -> None:
    """In the step in which branches begin they are noticed by the second one, and hold for both."""

    def run(pipe: Any) -> torch.Tensor:
        def order(k: int) -> Any:
            yield 0
            if k == at:
                scale(pipe.unet, 1.3, elsewhere)
            yield 1

        return torch.stack([pipe(order=order), pipe()])

    want, pipe = run(Guided()), Guided()
    with spread(pipe, warmup=99):
        got = run(pipe)
    torch.testing.assert_close(got[1], want[1])
    if at == 0:
        torch.testing.assert_close(got[0], want[0])


def test_weights_that_ranks_cannot_follow_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As compiled ones that share them: the branch that has begun begins again, and a loop of one's
    own is told what to do."""
    renew = Worker.renew
    monkeypatch.setattr(Worker, "renew", lambda w, *a: None if renew(w, *a) else False)

    def order(k: int, pipe: Any) -> Any:
        yield 0
        if k == 0:
            scale(pipe.unet, 1.3, True)
        yield 1

    plain, pipe = Guided(), Guided()
    want = [plain(order=partial(order, pipe=plain)), plain()]
    with spread(pipe, warmup=99):
        got = [pipe(order=partial(order, pipe=pipe)), pipe()]
    torch.testing.assert_close(got, want)
    own = asyncdiff.AsyncDenoiser(pipe.unet, devices=["cpu"] * 2, split="estimate", warmup=2)
    x, (first, second, _) = torch.randn(1, 4, 8, 8), pipe.texts
    with own.generation([9, 8], branches=2):
        own(x, torch.tensor(9), first)
        scale(pipe.unet, 0.9, True)
        own(x, torch.tensor(9), second)
        with pytest.raises(asyncdiff.InputError, match=r"between two calls of step 1.*copy_\(\)"):
            own(x, torch.tensor(8), first)
    own.close()


def freeu(unet: Any, on: bool) -> None:
    for block in unet.up_blocks:
        for name, value in {"s1": 0.5, "s2": 0.2, "b1": 1.6, "b2": 1.8}.items():
            setattr(block, name, value if on else None)


@torch.no_grad()
def scale(unet: Any, by: float, elsewhere: bool) -> None:
    for weight in unet.parameters():
        if elsewhere:
            weight.data = weight.data * by
        else:
            weight.mul_(by)


CHANGES: dict[str, tuple[Callable[[Any], None], Callable[[Any], None]]] = {
    "options": (lambda unet: freeu(unet, True), lambda unet: freeu(unet, False)),
    "weights": (lambda unet: scale(unet, 2.0, False), lambda unet: scale(unet, 0.5, False)),
    "other weights": (lambda unet: scale(unet, 2.0, True), lambda unet: scale(unet, 0.5, True)),
}


@pytest.mark.parametrize(
    ("texts", "change"),
    often(
        [([0, 2], "other weights")],  # options by themselves: test_module_state.py
        [(texts, change) for texts in ([0, 1], [0, 2]) for change in CHANGES],
    ),
    ids=str,
)
def test_a_denoiser_that_changes_between_steps_changes_for_all_branches(
    texts: list[int], change: str
) -> None:
    """Also for those whose turn comes when another one has noticed, and in later generations."""
    pipe = Guided(unet=True)
    make, undo = CHANGES[change]

    def changes(k: int, given: list[torch.Tensor]) -> list[torch.Tensor]:
        if k == 2:
            make(pipe.unet)
        return given

    def order(k: int) -> list[int]:
        return texts

    plain, want = pipe(order=order), pipe(order=order, callback=changes)
    undo(pipe.unet)
    assert not torch.allclose(plain, want, rtol=1e-3)
    with spread(pipe, warmup=99):
        for _ in range(2):
            torch.testing.assert_close(pipe(order=order, callback=changes), want)
            undo(pipe.unet)
            torch.testing.assert_close(pipe(order=order), plain)
