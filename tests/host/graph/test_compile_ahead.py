"""Pieces compiled by several processes at the same time, and found here in inductor's cache."""

from __future__ import annotations

import logging
import operator
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from toys import tower, tower_call

from asyncdiff import AsyncDenoiser, InputError, turns
from asyncdiff.environment import compile_workers
from asyncdiff.graph.compiled import ahead, pool, settings
from asyncdiff.graph.compiled import compile as compiling
from asyncdiff.graph.compiled.ahead import Compiling
from asyncdiff.graph.compiled.compile import Pieces
from asyncdiff.graph.compiled.kinds import Kind, Layout, kind_of
from asyncdiff.graph.compiled.pool import Pool, default_count
from asyncdiff.graph.compiled.transport import NotSentError, packed, unpacked
from asyncdiff.turns import Turn

ATEN = torch.ops.aten
CPU = torch.device("cpu")
HALVES = [
    ["enter", *(f"blocks.{k}" for k in range(3))],
    [f"blocks.{k}" for k in (3, 4, 5)] + ["leave"],
]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test gets what was compiled in another one."""
    monkeypatch.setattr(compiling, "_known", compiling._Known())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))


# ---- on the way ----------------------------------------------------------------------------------


def piece(last: Any = 1.5) -> fx.GraphModule:
    graph = fx.Graph()
    x, y = graph.placeholder("given_0"), graph.placeholder("given_1")
    both = graph.call_function(ATEN.cat.default, ([x, y], 0))
    cast = graph.call_function(ATEN._to_copy.default, (both,), {"dtype": torch.float64})
    parts = graph.call_function(ATEN.split.Tensor, (cast, 2))
    first = graph.call_function(operator.getitem, (parts, 0))
    graph.output((graph.call_function(ATEN.add.Tensor, (cast, last)), first))
    return fx.GraphModule(nn.Module(), graph)


def test_a_piece_arrives_as_it_was() -> None:
    """By its text go inductor's caches."""
    layouts = [Layout((2, 3), (3, 1), torch.float32, CPU, 0)] * 2
    sent = piece()
    arrived, given = unpacked(packed(sent, layouts))
    assert given == layouts and arrived.code == sent.code
    assert [n.name for n in arrived.graph.nodes] == [n.name for n in sent.graph.nodes]
    assert [n.target for n in arrived.graph.nodes] == [n.target for n in sent.graph.nodes]
    values = torch.rand(2, 3), torch.rand(2, 3)
    for got, want in zip(arrived(*values), sent(*values), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


def test_what_has_no_form_is_not_sent() -> None:
    with pytest.raises(NotSentError):
        packed(piece(), [lambda: 1])
    graph = fx.Graph()
    graph.output((graph.get_attr("body"),))
    root = nn.Module()
    root.add_module("body", nn.Identity())
    with pytest.raises(NotSentError, match="get_attr"):
        packed(fx.GraphModule(root, graph), [])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(4, 6),
        torch.empty(4, 6).t()[1:],
        torch.empty(3, 1, 5).expand(3, 4, 5),
        torch.empty(0, 3),
        torch.empty((), dtype=torch.int64),
        torch.empty(7, 9, dtype=torch.float16, device="meta")[1:, 2:],
    ],
)
def test_examples_are_laid_out_like_what_they_stand_for(tensor: torch.Tensor) -> None:
    layout = Layout.of(tensor)
    with FakeTensorMode():
        example = layout.example()
    assert Layout.of(example) == layout
    assert (example.shape, example.stride()) == (tensor.shape, tensor.stride())
    if tensor.device.type == "meta":  # counts as a GPU: what is not aligned is other code
        assert layout.offset == 3 and example.storage_offset() == 3


def test_kinds_are_noted_beside_inductors_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = kind_of("digest", settings.in_key(), [torch.ones(2), 3])
    other = kind_of("digest", settings.in_key(), [torch.ones(3), 3])
    assert kind.device == CPU and not kind.noted()
    kind.note()
    assert kind.noted() and not other.noted()
    # A GPU of the same model finds kernels compiled; one of another model does not.
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "AAB"[d.index])
    on = [
        kind._replace(given=(kind.given[0]._replace(device=torch.device("cuda", i)), "3"))
        for i in range(3)
    ]
    assert on[0] != on[1] and on[1].elsewhere == on[0].elsewhere and on[1].device.index == 1
    assert on[2].elsewhere != on[0].elsewhere != kind.elsewhere


def test_inductors_cache_tells_architectures_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    capability = {0: (9, 0), 1: (9, 0), 2: (8, 6)}
    named: list[int] = []
    monkeypatch.setattr(settings, "_name_the_first", lambda: named.append(0))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_capability",
        lambda d: capability[d if isinstance(d, int) else d.index],
    )
    seen = []
    for index in range(3):
        with settings.of_architecture(torch.device("cuda", index)):
            seen.append((config.cuda.arch, config.get_hash()))
    assert [arch for arch, _ in seen] == [None, None, "86"] and len(named) == 3
    assert seen[0] == seen[1] and seen[2][1] != seen[0][1]
    with settings.of_architecture(CPU):
        assert config.cuda.arch is None
    assert len(named) == 3


def test_settings_are_those_of_the_other_process() -> None:
    here = settings.here()
    there = {**here, "precision": "medium", "fp16": False, "threads": 3}
    there["inductor"] = here["inductor"] | {"max_fusion_size": 7}
    try:
        settings.take(there)
        assert settings.here() == there
    finally:
        settings.take(here)
    assert settings.here() == here


# ---- processes -----------------------------------------------------------------------------------


#: In such a process: nobody asks whether products whose sizes are odd are faster padded.
UNPADDED = """import torch
from torch._inductor.fx_passes import pad_mm
from asyncdiff.graph.compiled.worker import _stay_off_gpus

asked = []
pad_mm._should_pad = lambda *_, **__: asked.append(1) or True
pad_mm.has_triton = pad_mm.check_device = lambda *_: True
half = [torch.empty(size, 1536, dtype=torch.bfloat16) for size in (333, 1536)]
assert pad_mm.should_pad(None, *half, torch.ops.aten.mm) and asked
_stay_off_gpus()
assert not pad_mm.should_pad(None, *half, torch.ops.aten.mm) and len(asked) == 1
"""


@pytest.mark.slow
def test_nothing_is_run_on_gpus_to_find_out_whether_to_pad() -> None:
    """As inductor does otherwise, with memory that such a process is not to take."""
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", UNPADDED], check=True, env=os.environ | path, timeout=100)


#: In the place of a process that compiles: does what a job says, and says what it is called.
LIGHT = """import json, os, socket, struct, sys, time
there = socket.socket(fileno=int(sys.argv[2]))
first = True
while True:
    head = there.recv(8, socket.MSG_WAITALL)
    if not head:
        break
    job = there.recv(struct.unpack("!Q", head)[0], socket.MSG_WAITALL)
    if first:
        first = False
        continue
    if job == b"die":
        os._exit(3)
    if job == b"sleep":
        time.sleep(60)
    error = "" if job == b"good" else job.decode()
    said = json.dumps([error, error and "where"]).encode()
    there.sendall(struct.pack("!Q", len(said)) + said)
"""


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Pool]]:
    monkeypatch.setattr(pool, "_START", LIGHT)
    made: list[Pool] = []

    def make(count: int) -> Pool:
        made.append(Pool(count, 1, ["cpu"]))
        made[-1].start()
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_each_piece_has_an_answer(light: Callable[[int], Pool]) -> None:
    both = light(2)
    for _ in range(2):  # again by the same processes
        jobs = {k: b"good" if k % 2 else b"no such lowering" for k in range(6)}
        answers = dict(both.compile(jobs))
        assert answers == {k: "" if k % 2 else "no such lowering" for k in range(6)}


def test_a_process_that_ends_takes_its_piece_with_it_and_no_other(
    light: Callable[[int], Pool],
) -> None:
    both = light(2)
    answers = dict(both.compile({0: b"die", **dict.fromkeys(range(1, 6), b"good")}))
    assert "ended" in answers.pop(0) and answers == dict.fromkeys(range(1, 6), "")
    answers = dict(both.compile({0: b"die", 1: b"good"}))  # of one that is left
    assert "ended" in answers[0] and "left" in answers[1]


def test_a_process_that_is_stuck_is_ended(
    light: Callable[[int], Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_PATIENCE", 0.3)
    both = light(2)
    stuck = [p._process for p in both._processes]
    answers = dict(both.compile({0: b"sleep", 1: b"good"}))
    assert "stuck" in answers[0] and answers[1] == ""
    assert [p.poll() for p in stuck].count(-signal.SIGKILL) == 1


def test_processes_that_are_asked_no_more_are_ended(light: Callable[[int], Pool]) -> None:
    """As after Ctrl-C."""
    both = light(2)
    processes = [p._process for p in both._processes]
    for job, _ in both.compile({0: b"good", 1: b"sleep", 2: b"good"}):
        assert job == 0
        break
    both.close()
    assert all(p.poll() is not None for p in processes)
    both.start()
    assert dict(both.compile({0: b"good"})) == {0: ""}


def test_where_no_process_can_be_started_none_is_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    none = Pool(2, 1, ["cpu"])
    with caplog.at_level(logging.WARNING, "asyncdiff"):
        none.start()
    assert len(caplog.records) == 1 and "one after another" in caplog.text
    assert list(none.compile({0: b"good"})) == [(0, "no process that compiles is left")]


def test_how_many_there_are_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(cores: int, gigabytes: int, processes: int = 1) -> int:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
        monkeypatch.setattr(pool, "_available", lambda: gigabytes << 30)
        return default_count(processes)

    assert [on(n, 100) for n in (1, 2, 3, 8, 32, 128)] == [0, 0, 1, 4, 16, 16]
    assert on(32, 100, 2) == 8 and on(4, 100, 2) == 0
    assert on(32, 6) == 4 and on(32, 1) == 0
    on(32, 100)
    assert [pool.threads_of(n) for n in (0, 4, 8, 16, 64)] == [4, 4, 4, 2, 1]
    assert pool.threads_of(16, 2) == 1


def test_the_environment_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, count in (("", None), ("0", 0), ("3", 3)):
        monkeypatch.setenv("ASYNCDIFF_COMPILE_WORKERS", said)
        assert compile_workers() == count
    for said in ("-1", "many"):
        monkeypatch.setenv("ASYNCDIFF_COMPILE_WORKERS", said)
        with pytest.raises(InputError, match="ASYNCDIFF_COMPILE_WORKERS"):
            AsyncDenoiser(tower(), devices=["cpu"] * 2, compile=True)


# ---- what is compiled ahead ----------------------------------------------------------------------


class Answers:
    """In the place of a pool."""

    def __init__(self, answer: str = "") -> None:
        self.answer, self.started, self.jobs = answer, 0, list[Kind]()

    def start(self) -> None:
        self.started += 1

    def compile(self, jobs: Mapping[Kind, bytes]) -> Iterator[tuple[Kind, str]]:
        self.jobs += jobs
        for job in reversed(list(jobs)):
            yield job, self.answer

    def close(self) -> None:
        pass


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """What inductor is given here; it is run as it is."""
    given: list[fx.GraphModule] = []

    def take(piece: fx.GraphModule, arguments: list[Any]) -> Callable[..., Any]:
        given.append(piece)
        return piece.forward

    monkeypatch.setattr(torch._inductor, "compile", take)
    return given


def pieces_of(denoiser: AsyncDenoiser, way: Compiling) -> list[Pieces]:
    engine = denoiser._engine
    return [w.pieces(engine._received(w), way) for w in engine.workers]


@pytest.fixture
def denoiser() -> Iterator[AsyncDenoiser]:
    denoiser = AsyncDenoiser(tower(), devices=["cpu"] * 2, split=HALVES)
    denoiser.prepare(**tower_call())
    yield denoiser
    denoiser.close()


def test_all_ranks_kinds_go_to_the_processes_once(
    denoiser: AsyncDenoiser, given: list[fx.GraphModule], caplog: pytest.LogCaptureFixture
) -> None:
    way, answers = Compiling("regions", [CPU], 2), Answers()
    way._pool = answers  # type: ignore[assignment]
    pieces = pieces_of(denoiser, way)
    kinds = {kind for each in pieces for kind in each.kinds}
    way.ahead(pieces)
    assert answers.started == 1 and len(answers.jobs) == len(kinds) == len(given) == 4
    sizes = [
        len(next(p.kinds[k] for p in pieces if k in p.kinds).graph.nodes) for k in answers.jobs
    ]
    assert sizes == sorted(sizes, reverse=True)
    for each in pieces:
        each.compile()
    assert len(given) == 4  # nothing was left
    compiling._known = compiling._Known()  # another process, with the same folder
    way.ahead(pieces_of(denoiser, way))
    assert len(given) == 4 and answers.started == 1 and not caplog.records


def test_what_another_process_is_at_is_waited_for(
    denoiser: AsyncDenoiser, given: list[fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    way, answers = Compiling("regions", [CPU], 2), Answers()
    way._pool = answers  # type: ignore[assignment]
    pieces = pieces_of(denoiser, way)
    kind = next(iter(pieces[0].kinds))
    other = Turn(kind.turn())
    assert other.take()
    way.ahead(pieces)
    assert kind not in answers.jobs and len(answers.jobs) == len(given) == 3
    waited: list[int] = []

    def until_the_other_has_ended(seconds: float) -> None:
        waited.append(len(given))
        other.close()

    monkeypatch.setattr(turns.time, "sleep", until_the_other_has_ended)
    for each in pieces:
        each.compile()
    assert waited == [3] and len(given) == 4 and kind.noted()


def test_what_processes_fail_at_is_compiled_here(
    denoiser: AsyncDenoiser, given: list[fx.GraphModule], caplog: pytest.LogCaptureFixture
) -> None:
    way = Compiling(True, [CPU], 2)
    way._pool = Answers("no such lowering")  # type: ignore[assignment]
    pieces = pieces_of(denoiser, way)
    way.ahead(pieces)
    assert not given
    assert [r.getMessage() for r in caplog.records] == [
        "pieces are compiled one after another, which is slower: no such lowering"
    ]
    assert all(each.compile().pieces for each in pieces) and len(given) == 4


def test_processes_that_serve_nothing_are_asked_no_more(
    denoiser: AsyncDenoiser,
    given: list[fx.GraphModule],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    way = Compiling("regions", [CPU], 2)
    way._pool = Answers()  # type: ignore[assignment]
    misses = iter(range(100))
    monkeypatch.setattr(ahead, "_misses", lambda: next(misses))
    way.ahead(pieces_of(denoiser, way))
    assert len(given) == 3 and "is not found in inductor's cache" in caplog.text


def test_without_processes_nothing_is_run_ahead(
    denoiser: AsyncDenoiser, given: list[fx.GraphModule]
) -> None:
    for way in (Compiling("whole", [CPU], 0), Compiling(None, [CPU])):
        assert not way.side_by_side
        assert not any(each.kinds for each in pieces_of(denoiser, way))
    with torch._inductor.config.patch(fx_graph_cache=False):  # nowhere to find anything
        assert not Compiling("whole", [CPU], 2).side_by_side


# ---- inductor itself -----------------------------------------------------------------------------


def compiled(workers: int, monkeypatch: pytest.MonkeyPatch, folder: Path) -> torch.Tensor:
    monkeypatch.setenv("ASYNCDIFF_COMPILE_WORKERS", str(workers))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    monkeypatch.setattr(compiling, "_known", compiling._Known())
    counters.clear()
    denoiser = AsyncDenoiser(tower(), devices=["cpu"] * 2, split=HALVES, compile=True)
    call = tower_call()
    latents, times = call["hidden_states"], [torch.tensor(900 - 100 * k) for k in range(3)]
    with denoiser.generation(torch.stack(times)):
        for t in times:
            latents = latents - 0.1 * denoiser(
                latents, t, encoder_hidden_states=call["encoder_hidden_states"]
            )
    assert denoiser.report().compiled
    denoiser.close()
    return latents


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Our warnings."""
    ours = (r for r in caplog.records if r.name == "asyncdiff" and r.levelno >= logging.WARNING)
    return [r.getMessage() for r in ours]


@pytest.mark.slow
def test_processes_compile_what_is_then_found_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = compiled(0, monkeypatch, tmp_path / "alone")
    assert counters["inductor"]["fxgraph_cache_miss"] == 4
    both = compiled(2, monkeypatch, tmp_path / "both")
    found = counters["inductor"]
    assert (found["fxgraph_cache_hit"], found["fxgraph_cache_miss"]) == (4, 0)
    assert torch.equal(both, alone) and not said(caplog)
    # What one process left there serves the next one, whoever compiled it.
    assert torch.equal(compiled(0, monkeypatch, tmp_path / "both"), alone)
    assert counters["inductor"]["fxgraph_cache_hit"] == 4
    monkeypatch.setattr(Pool, "start", lambda self: pytest.fail("everything is on the disk"))
    monkeypatch.setattr(Compiling, "start", lambda self: None)  # the export cannot know
    assert torch.equal(compiled(2, monkeypatch, tmp_path / "alone"), alone)


BESIDE = """import sys
from torch._dynamo.utils import counters
from toys import tower, tower_call
from asyncdiff import AsyncDenoiser
from asyncdiff.graph.compiled.pool import Pool

sent = []
plain = Pool.compile

def counted(self, jobs):
    sent.extend(jobs)
    return plain(self, jobs)

Pool.compile = counted
split = [["enter", "blocks.0", "blocks.1", "blocks.2"]]
split.append(["blocks.3", "blocks.4", "blocks.5", "leave"])
denoiser = AsyncDenoiser(tower(), devices=["cpu"] * 2, split=split, compile=True)
print("ready", flush=True)
sys.stdin.readline()
denoiser.prepare(**tower_call())
found = counters["inductor"]
print(found["fxgraph_cache_miss"] + len(sent), found["fxgraph_cache_hit"], flush=True)
denoiser.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_processes_that_start_at_once_compile_each_kind_once(workers: int, tmp_path: Path) -> None:
    more = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "shared"),
        "ASYNCDIFF_COMPILE_WORKERS": str(workers),
    }
    both = [
        subprocess.Popen(
            [sys.executable, "-c", BESIDE],
            env=os.environ | more,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        for process in both:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        told = [process.communicate("go\n", timeout=300)[0].split() for process in both]
    finally:
        for process in both:
            process.kill()
            process.wait()
    assert sum(int(made) for made, _ in told) == 4
    assert sum(int(hits) for _, hits in told) >= 4


@pytest.mark.slow
def test_a_process_that_is_killed_costs_time_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    give = pool._Process.give
    killed: list[int] = []

    def kill_the_first(self: Any, job: Any, data: bytes) -> None:
        give(self, job, data)
        if job is not None and not killed:
            killed.append(self._process.pid)
            os.kill(self._process.pid, signal.SIGKILL)

    monkeypatch.setattr(pool._Process, "give", kill_the_first)
    got = compiled(2, monkeypatch, tmp_path / "both")
    found = counters["inductor"]
    assert (found["fxgraph_cache_hit"], found["fxgraph_cache_miss"]) == (3, 1) and killed
    (line,) = said(caplog)
    assert "has ended" in line
    want = compiled(0, monkeypatch, tmp_path / "both")
    assert torch.equal(got, want)


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them() -> None:
    code = """import time
from asyncdiff.graph.compiled.pool import Pool
pool = Pool(2, 1, ["cpu"])
pool.start()
print(*(p._process.pid for p in pool._processes), flush=True)
time.sleep(60)"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    time.sleep(8)  # they have begun to compile something small
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
