"""Rows of timesteps: the bits of runs that compute all themselves, in every way to run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import reference
import torch
from toys import toy, toy_call

import asyncdiff
from asyncdiff import AsyncDenoiser, ParallelConfig, RankError
from asyncdiff.generation.generation import Generation
from asyncdiff.generation.spec import GenerationSpec
from asyncdiff.graph import hoist as hoisting
from asyncdiff.graph.hoist import Hoisted, hoist
from asyncdiff.graph.program import KEEP, TIMED
from asyncdiff.graph.row import Row, padded
from asyncdiff.integrations.diffusers.timesteps import TimestepTracker
from asyncdiff.runtime import component_program
from asyncdiff.runtime import input_cache as conditioning
from asyncdiff.runtime import rows as timetable
from asyncdiff.runtime.cuda_graphs import GraphCache, Issued
from asyncdiff.runtime.rows import Rows
from asyncdiff.runtime.worker import Worker

SPLITS = {
    1: [["enter", "down", "mix", "up", "leave"]],
    2: [["enter", "down"], ["mix", "up", "leave"]],
    3: [["enter", "down.0"], ["down.1", "down.2", "mix"], ["up", "leave"]],
}
CIRCLE = [["down.1", "down.2", "mix"], ["enter", "down.0", "up", "leave"]]


def scheduler(steps: int = 8) -> Any:
    made = diffusers.DDIMScheduler(clip_sample=False)
    made.set_timesteps(steps)
    return made


def spread(components: int = 2, module: Any = None, **settings: Any) -> AsyncDenoiser:
    ranks = components + settings.get("stride", 1) - 1
    ranks = components if settings.get("schedule") == "wavefront" else ranks
    ranks *= 2 if settings.get("guidance") == "split" else 1
    settings.setdefault("split", SPLITS[components])
    return AsyncDenoiser(
        module or toy(), devices=["cpu"] * ranks, components=components, **settings
    )


def run(
    denoiser: AsyncDenoiser, steps: int = 8, seed: int = 1, change: int | None = None
) -> torch.Tensor:
    """Final latents; with ``change`` the conditioning is another from that step on."""
    sampler, call = scheduler(steps), toy_call(seed=seed)
    latents, text = call["sample"], call["encoder_hidden_states"]
    with denoiser.generation(sampler.timesteps, sampler):
        for k, t in enumerate(sampler.timesteps):
            if k == change:
                text.mul_(2)
            (noise,) = denoiser(latents, t, encoder_hidden_states=text)
            latents = latents - (0.1 + 0.01 * k) * noise
    return latents


class Everything:
    """While it is entered, denoisers are prepared to compute everything in every run."""

    def __enter__(self) -> None:
        self.patch = pytest.MonkeyPatch()

        def without(program: Any) -> Hoisted:
            for node in program.graph.nodes:
                if node.meta.get(KEEP) == TIMED:
                    del node.meta[KEEP]
            return hoist(program)

        def select(rows: Rows, time: Any, version: int) -> None:
            if rows.time is not None:
                rows.time.copy_(torch.as_tensor(time))

        self.patch.setattr(component_program, "hoist", without)
        self.patch.setattr(Rows, "select", select)

    def __exit__(self, *_: Any) -> None:
        self.patch.undo()


def without_rows(make: Callable[[], AsyncDenoiser], *args: Any, **options: Any) -> torch.Tensor:
    with Everything():
        denoiser = make()
        result = run(denoiser, *args, **options)
        assert all(w.program.rows.program is None for w in denoiser._engine.workers)  # type: ignore[union-attr]
        denoiser.close()
    return result


@pytest.fixture(autouse=True)
def toys_rows_are_for_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of denoisers are in which all that is made of the timestep depends on the text."""
    monkeypatch.setattr(hoisting, "_LESS", 0.0)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rank of every row that is computed."""
    ranks: list[int] = []
    compute = Rows.execute

    def counted(rows: Rows) -> Issued:
        ranks.append(rows._graphs.rank)
        return compute(rows)

    monkeypatch.setattr(Rows, "execute", counted)
    return ranks


@pytest.mark.parametrize(
    "settings",
    [
        {"components": 1},
        {"components": 2},
        {"split": CIRCLE},
        {"stride": 2, "warmup": 3},
        {"components": 3, "stride": 2, "time_shift": True, "exact_tail": 1},
        {"components": 3, "schedule": "wavefront", "exact_tail": 2},
        {"guidance": "split", "stride": 2},
        {"exact_mode": "split", "warmup": 4, "exact_tail": 2},
        {"guidance": "split", "exact_mode": "split", "warmup": 3},
        {"warmup": "auto"},
        {"extrapolate": 1.0},
    ],
    ids=lambda settings: " ".join(f"{k}={v}" for k, v in settings.items() if k != "split"),
)
def test_the_same_bits_in_every_mode(settings: dict[str, Any]) -> None:
    want = without_rows(lambda: spread(**settings))
    other = without_rows(lambda: spread(**settings), seed=2)
    changed = without_rows(lambda: spread(**settings), change=5)
    denoiser = spread(**settings)
    for _ in range(2):
        assert torch.equal(run(denoiser), want)
        assert torch.equal(run(denoiser, seed=2), other)
        assert torch.equal(run(denoiser, change=5), changed)
    denoiser.close()


@pytest.mark.parametrize("spec", [reference.SMALL, reference.SMALL_XL], ids=lambda s: s["name"])
def test_the_same_bits_of_a_pipeline(spec: dict[str, Any], computed: list[int]) -> None:
    spec = spec | {"stride": 2}
    ranks = spec["components"] + 1

    def parallel() -> tuple[Any, Any]:
        pipe = reference.pipeline(spec)
        handle = asyncdiff.parallelize(pipe, devices=["cpu"] * ranks, **reference.settings(spec))
        return pipe, handle

    with Everything():
        pipe, handle = parallel()
        want = reference.run(pipe, spec)
        handle.restore()
    assert not computed
    pipe, handle = parallel()
    assert torch.equal(reference.run(pipe, spec), want)
    assert len(computed) <= ranks * (1 + spec["steps"])  # with that of the first run
    computed.clear()
    assert torch.equal(reference.run(pipe, spec), want)
    # The prompt's tensors are new ones, of the same values.
    assert not computed
    handle.restore()


def test_rows_are_computed_once(computed: list[int]) -> None:
    """Again only for timesteps and conditioning that are others than before."""
    denoiser = spread(stride=2, warmup=2)
    run(denoiser)
    ranks = denoiser._engine.workers  # type: ignore[union-attr]
    # Rank 2 is the copy: it serves every other step. Each rank has computed one to be prepared.
    assert [computed.count(r) for r in range(3)] == [1 + 2 + 3, 1 + 2 + 3, 1 + 3]
    computed.clear()
    run(denoiser)
    assert not computed
    run(denoiser, seed=2)
    assert len(computed) == 5 + 5 + 3
    computed.clear()
    assert ranks[0].program.rows.slots == 8
    run(denoiser, seed=2, steps=5)
    assert len(computed) == sum(len(rank.program.rows.table) for rank in ranks)
    assert ranks[0].program.rows.slots == 5
    computed.clear()
    run(denoiser, seed=2, change=4, steps=5)
    assert 0 < len(computed) <= 3  # those after the change
    denoiser.close()


class Modulated(torch.nn.Module):
    """Modulates its ``blocks`` by the timestep, the text before the first one."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.texts = torch.nn.Linear(4, 4)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(blocks)])

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor]:
        time = timestep.sin().expand(len(sample), 4)
        text = self.texts(encoder_hidden_states * (1 + self.blocks[0](time)))
        for block in self.blocks:
            sample = torch.relu(sample * block(time) + text)
        return (sample,)


@pytest.mark.parametrize("blocks", [12, 2])
def test_rows_of_the_timestep_alone_stay_for_another_prompt(
    blocks: int, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a block makes something of the prompt and the timestep, if that is little."""
    monkeypatch.setattr(hoisting, "_LESS", 0.1)
    torch.manual_seed(0)
    module = Modulated(blocks).eval().requires_grad_(False)
    times, prompts = torch.tensor([9.0, 5.0, 2.0]), torch.randn(3, 2, 4)
    denoiser = AsyncDenoiser(module, devices=["cpu"], components=1, warmup=1)
    for number, prompt in enumerate(prompts):
        computed.clear()
        with denoiser.generation(times):
            for time in times:
                sample = torch.randn(2, 4)
                (found,) = denoiser(sample, time, prompt)
                assert torch.equal(found, module(sample, time, prompt)[0])
        if number:
            assert len(computed) == (0 if blocks == 12 else len(times))
    denoiser.close()


@pytest.mark.parametrize("modes", [{}, {"guidance": "split"}, {"exact_mode": "split"}])
def test_conditioning_is_compared_before_anything_is_under_way(
    modes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA that is a wait of the host."""
    events: list[str] = []
    same, work = conditioning._same, Worker.run

    def compared(*tensors: Any) -> bool:
        events.append("compare")
        return same(*tensors)

    def ran(worker: Worker, slots: Any) -> Any:
        events.append("run")
        return work(worker, slots)

    monkeypatch.setattr(conditioning, "_same", compared)
    monkeypatch.setattr(Worker, "run", ran)
    denoiser = spread(warmup=3, **modes)
    for _ in range(2):
        events.clear()
        run(denoiser, change=5)
        count = events.index("run")
        assert 0 < count <= 3 and "compare" not in events[count:]
    denoiser.close()


def test_an_abandoned_generation_leaves_no_rows(computed: list[int]) -> None:
    """A rank may not have been given its conditioning."""
    denoiser = spread()
    want = run(denoiser)
    worker = denoiser._engine.workers[1]  # type: ignore[union-attr]
    sound = worker.run
    worker.run = lambda slots: 1 / 0  # type: ignore[assignment, method-assign]
    with pytest.raises(RankError):
        run(denoiser, seed=2)
    worker.run = sound  # type: ignore[method-assign]
    computed.clear()
    assert torch.equal(run(denoiser), want)
    assert len(computed) == 16
    denoiser.close()


# ---- whole generations --------------------------------------------------------------------------


def generate(denoiser: AsyncDenoiser, seed: int = 1, steps: int = 8, **options: Any) -> Any:
    call = toy_call(seed=seed)
    return denoiser.generate(
        call["sample"][:1],
        {"encoder_hidden_states": call["encoder_hidden_states"]},
        scheduler(),
        num_inference_steps=steps,
        guidance_scale=4.0,
        **options,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"stride": 2, "warmup": 3},
        {"components": 3, "stride": 2, "time_shift": True},
        {"components": 3, "schedule": "wavefront"},
        {"split": CIRCLE},
    ],
    ids=["stride", "time_shift", "waves", "circle"],
)
def test_the_same_bits_on_the_ranks(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a table, and where it would be too large: the runs then compute their rows."""
    denoiser = spread(**settings)
    got = [generate(denoiser, seed) for seed in (1, 2)]
    again = [generate(denoiser, seed) for seed in (1, 2)]
    denoiser.close()
    monkeypatch.setattr(timetable, "TABLE_BYTES", 0)
    denoiser = spread(**settings)
    want = [generate(denoiser, seed) for seed in (1, 2)]
    denoiser.close()
    assert all(torch.equal(a, b) for a, b in zip(got + again, want * 2, strict=True))
    assert not torch.equal(*want)


@pytest.mark.parametrize("name", ["small", "small_xl"])
def test_the_same_bits_of_a_unet_in_whole_generations(
    name: str, monkeypatch: pytest.MonkeyPatch, computed: list[int]
) -> None:
    from asyncdiff.graph.example_inputs import example_inputs

    unet = reference.denoiser(name)
    conditioning = example_inputs(unet)
    latents = conditioning.pop("sample")[:1]
    del conditioning["timestep"]
    results = []
    for most in (timetable.TABLE_BYTES, 0):
        monkeypatch.setattr(timetable, "TABLE_BYTES", most)
        denoiser = AsyncDenoiser(unet, devices=["cpu"] * 3, stride=2, split="estimate")
        for _ in range(2):
            computed.clear()
            results.append(
                denoiser.generate(
                    latents,
                    conditioning,
                    scheduler(),
                    num_inference_steps=7,
                    guidance_scale=4.0,
                )
            )
        # A second picture needs no row computed where there is a table.
        assert bool(computed) == (most == 0)
        denoiser.close()
    assert all(torch.equal(r, results[0]) for r in results)


# ---- bounds --------------------------------------------------------------------------------------


def test_a_table_that_is_too_large_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, computed: list[int]
) -> None:
    want = without_rows(spread)
    denoiser = spread()
    assert torch.equal(run(denoiser), want)
    nbytes = denoiser._engine.workers[0].program.rows.row.nbytes  # type: ignore[union-attr]
    for most, again in ((8 * nbytes, 0), (8 * nbytes - 1, 16)):
        monkeypatch.setattr(timetable, "TABLE_BYTES", most)
        run(denoiser)
        computed.clear()
        assert torch.equal(run(denoiser), want)
        assert len(computed) == again
    denoiser.close()


def test_values_that_are_too_large_stay_in_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    want = without_rows(spread)
    monkeypatch.setattr(component_program, "hoist", lambda program: hoist(program, 0))
    denoiser = spread()
    assert torch.equal(run(denoiser), want)
    for worker in denoiser._engine.workers:  # type: ignore[union-attr]
        row = worker.program.rows.row
        assert row is not None and row.nbytes == padded(8)
    assert torch.equal(run(denoiser), want)
    denoiser.close()


def test_a_row_is_packed_and_a_table_keeps_the_newest() -> None:
    like = [
        torch.arange(6.0).view(2, 3).T,
        torch.tensor(7),
        torch.arange(2, dtype=torch.bfloat16).expand(3, 2),
    ]
    row = Row(like)
    row.store(like)
    assert row.nbytes == 3 * 256 and row.values[0].stride() == (1, 3)
    assert all(torch.equal(a, b) for a, b in zip(row.values, like, strict=True))
    calls: list[float] = []

    def program(time: torch.Tensor) -> list[torch.Tensor]:
        calls.append(time.item())
        return [like[0], time, like[2]]

    time = torch.tensor(0.0)
    rows = Rows(program, lambda: [time], time, GraphCache(0, None))
    rows.warm_up()
    rows.begin(2)
    for known in (9.0, 8.0, 7.0, 8.0):
        rows.select(known, 0)
        assert rows.values[1] == known
    assert calls == [0.0, 9.0, 8.0, 7.0]
    rows.select(9.0, 0)
    rows.select(9.0, 1)
    assert calls[4:] == [9.0, 9.0] and rows.values[1] == 9 and len(rows.table) == 2


# ---- timesteps -----------------------------------------------------------------------------------


def test_a_timestep_that_was_not_announced_is_the_one_that_is_used() -> None:
    denoiser, plain, call = spread(1), toy(), toy_call()
    text = call["encoder_hidden_states"]
    with denoiser.generation(torch.tensor([900, 800])):
        for t in (torch.tensor(123), torch.tensor(321)):
            got = denoiser(call["sample"], t, encoder_hidden_states=text)[0]
            torch.testing.assert_close(got, plain(call["sample"], t, text)[0])
    denoiser.close()


class PerSample(torch.nn.Module):
    """Takes a timestep for every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        shift = self.first.weight @ timestep.sin().expand(4, -1)
        return (self.second(torch.relu(self.first(sample) + shift.T)),)


@pytest.mark.parametrize("settings", [{"stride": 2}, {"guidance": "split"}], ids=["one", "split"])
@pytest.mark.parametrize("alike", [False, True])
def test_a_timestep_for_every_sample(settings: dict[str, Any], alike: bool) -> None:
    torch.manual_seed(0)
    module = PerSample().eval().requires_grad_(False)
    times = torch.tensor([[9.0, 8.0], [7.0, 5.0], [3.0, 2.0], [1.0, 0.5]])
    times = times[:, :1].expand(-1, 2) if alike else times
    sample = torch.randn(2, 4)
    split = [["first"], ["second"]]
    denoiser = spread(module=module, split=split, warmup=4, **settings)
    for _ in range(2):
        with denoiser.generation(times):
            for t in times:
                torch.testing.assert_close(denoiser(sample, t)[0], module(sample, t)[0])
    denoiser.configure(warmup=1)
    with denoiser.generation(times):
        for k, t in enumerate(times):
            got = denoiser(sample, t)[0]
            if k < 1:
                torch.testing.assert_close(got, module(sample, t)[0])
    denoiser.close()


def test_what_is_known_to_be_announced() -> None:
    """Only a view of the very element, unchanged since, of the same dtype."""
    times = torch.tensor([900.0, 500.0, 100.0])
    generation = Generation(GenerationSpec.of(ParallelConfig(), times))
    assert generation._announced(times[1], 1) and generation._announced(times[1].expand(2), 1)
    assert not generation._announced(times[1], 2)
    assert not generation._announced(times[1].clone(), 1)
    assert not generation._announced(times[1:], 1)
    assert not generation._announced(times[1].double(), 1)
    times.add_(1)
    assert not generation._announced(times[1], 1)
    with torch.inference_mode():  # has no version
        times = torch.tensor([900.0])
        generation = Generation(GenerationSpec.of(ParallelConfig(), times))
        assert generation._announced(times[0], 0)
        times.add_(1)
        assert not generation._announced(times[0], 0)


def test_a_pipeline_calls_with_what_it_announced() -> None:
    sampler = scheduler()
    for start in (0, 3):
        times = TimestepTracker(sampler, sampler.timesteps[start])
        generation = Generation(GenerationSpec.of(ParallelConfig(), times.values))
        assert len(times.values) == 8 - start
        for k, t in enumerate(sampler.timesteps[start:]):
            assert generation._announced(t, k) and generation._announced(t.expand(2), k)


FLOW = {"cast, then divided": lambda t, d: t.to(d) / 1000, "divided": lambda t, d: (t / 1000).to(d)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("made", FLOW.values(), ids=FLOW)
def test_times_that_a_pipeline_computes_are_known(made: Any, dtype: torch.dtype) -> None:
    """FLUX and others pass t/1000 in half precision: known as announced, with the same bits."""
    sampler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    sampler.set_timesteps(12)
    for start in (0, 5):
        calls = [made(t.expand(2), dtype) for t in sampler.timesteps[start:]]
        times = TimestepTracker(sampler, calls[0])
        generation = Generation(GenerationSpec.of(ParallelConfig(), times.values))
        known = [times.known(k, call) for k, call in enumerate(calls)]
        assert all(torch.equal(a, b) for a, b in zip(known, calls, strict=True))
        announced = [generation._announced(t, k) for k, t in enumerate(known)]
        # The first one may say nothing of how it came about: then the other way is not followed.
        if made is FLOW["cast, then divided"] or dtype is torch.float32:
            assert all(announced)
        else:
            assert announced[0] and announced == sorted(announced, reverse=True)


def test_times_that_differ_from_the_announced_stay_the_calls() -> None:
    sampler = diffusers.FlowMatchEulerDiscreteScheduler()
    sampler.set_timesteps(4)
    first, second = (t.expand(2) / 1000 for t in sampler.timesteps[:2])
    times = TimestepTracker(sampler, first)
    assert (
        times.reading.mapping == "t / n"
        and times.start == 0
        and float(sampler.timesteps[-1]) == 1.0
    )
    other = torch.nextafter(second, torch.zeros(2))
    assert times.known(1, other) is other and times.known(2, second) is second
    # Tokens that stay as they are have another time.
    each = torch.tensor([float(first[0]), 0.0])
    assert TimestepTracker(sampler, each).known(0, each) is each
    # What arrives late, from a GPU: an ulp is let pass, another sample's timestep is not.
    times = TimestepTracker(sampler, first)
    times._compare(1, second)
    times._compare(1, other)
    assert times.known(2, second) is second
    times = TimestepTracker(sampler, first)
    with pytest.raises(asyncdiff.SchedulerError, match="a timestep for each sample"):
        times._compare(1, torch.tensor([float(second[0]), 0.0]))
