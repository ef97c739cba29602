"""The benchmark of the exchange: its logic on the CPU, and the whole command on the host fabric."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import torch

import asyncdiff_core as core
import tables
from asyncdiff.cli import main
from asyncdiff_bench import cases, gate, payload, runner, ways
from asyncdiff_bench.bench import Bench, count_for
from asyncdiff_bench.cases import exposed
from asyncdiff_bench.cuda_world import CudaWorld
from asyncdiff_bench.errors import BenchError
from asyncdiff_bench.figures import Figure, LeftOut, Results
from asyncdiff_bench.host_world import HostWorld
from asyncdiff_bench.links.channels import ChannelLink
from asyncdiff_bench.machine import Machine
from asyncdiff_bench.plot import draw, picture
from asyncdiff_bench.settings import Settings
from asyncdiff_bench.spread import Spread
from asyncdiff_bench.table import digits, render
from asyncdiff_bench.worker import Job

HOST = Machine.of(["cpu"])
ONE_GPU = Machine.of(["cuda:0"])
TWO_GPUS = Machine.of(["cuda:0", "cuda:1"])
FOUR_GPUS = Machine.of([f"cuda:{i}" for i in range(4)])
WORKER = Path(__file__).parents[2] / "exchange_worker.py"


def settings(machine: Machine = HOST, **options: Any) -> Settings:
    options = {"sizes": "1K,64K", "rounds": 2, "seconds": 60.0, **options}
    return Settings.choose(machine, **options)


def made_up() -> Results:
    """Figures such as two GPUs would give."""
    out = Results(("cuda:0", "cuda:1"), seconds=12.34)
    for way, factor in (("auto", 1.0), ("nccl-broadcast", 3.0)):
        for name, nbytes in (("64K", 65536), ("1M", 1 << 20), ("sd21-N2", 60_000_000)):
            bundle = name == "sd21-N2"
            for launch in ("graph", "eager"):
                us = [factor * nbytes / 1e4 + i for i in range(3)]
                case = "bundles" if bundle else "latency"
                value = Spread.of(us)
                out.figures.append(
                    Figure(case, way, launch, name, nbytes, 1, "one_way", "µs", value, nbytes)
                )
        one = Spread.of([1.5])
        out.figures += [
            Figure("bandwidth", way, "graph", "1M", 1 << 20, 1, "per_bundle", "µs", one, 1 << 20),
            Figure("enqueue", way, "eager", "64K", 65536, 1, "put_cpu", "µs", one),
            Figure(
                "exposed", way, "eager", "sd21-N2", 6, 9, "compute_slower", "%", one,
                details={"side": "sender", "load": "a bundle a tick"},
            ),
        ]  # fmt: skip
    out.left_out.append(LeftOut("latency", "memcpy", "needs a GPU"))
    out.left_out.append(LeftOut("latency", "copy", "wrong data arrived", "1M", failed=True))
    return out


# --- numbers


def test_spread() -> None:
    five = Spread.of([5.0, 1.0, 4.0, 2.0, 3.0])
    assert five == Spread(3.0, 2.0, 4.0, 1.0, 5.0, 5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError, match="no rounds"):
        Spread.of([])


def test_results_survive_json() -> None:
    results = made_up()
    assert Results.from_dict(json.loads(json.dumps(results.to_dict()))).to_dict() == (
        results.to_dict()
    )
    assert [x.way for x in results.failed] == ["copy"]
    figure = Figure("c", "w", "graph", "1K", 1000, 1, "m", "µs", Spread.of([2.0]), moved=4000)
    assert figure.gb_per_s == 2.0
    assert figure.to_dict()["gb_per_s"] == 2.0


def test_settings_and_jobs_survive_json(tmp_path: Path) -> None:
    job = Job(settings(TWO_GPUS), (("latency", "auto"),), "out", 5)
    job.write(tmp_path / "job")
    assert Job.read(tmp_path / "job") == job
    quick = Settings.choose(ONE_GPU, quick=True)
    assert quick.rounds < Settings.choose(ONE_GPU).rounds


def test_sizes() -> None:
    assert payload.read_sizes("16K, 1m,3,2GB") == (16384, 1 << 20, 3, 2 << 30)
    assert [payload.size_text(n) for n in (16384, 1 << 20, 1000)] == ["16K", "1M", "1000"]
    for bad in ("", "1K,", "-1", "0", "1T", "5G", "1.5M"):
        with pytest.raises(BenchError, match="write 16K"):
            payload.read_sizes(bad)


def test_bundles_of_denoisers_are_those_that_were_measured() -> None:
    known = payload.models()
    assert {n: (round(p.nbytes / 2**20, 1), len(p.specs)) for n, p in known.items()} == {
        "18x256K": (4.5, 18),
        "sd21-N2": (57.7, 9),
        "sdxl-N2": (162.5, 12),
    }
    for p in known.values():
        assert count_for(p, "graph") % 4 == count_for(p, "eager") % 4 == 0


def test_contents_depend_on_the_seed_alone() -> None:
    odd = payload.Payload("odd", (core.TensorSpec("uint8", (3,)), core.TensorSpec("int16", (5,))))
    a, b = (odd.memory(torch.device("cpu")) for _ in range(2))
    a.fill(1)
    b.fill(2)
    assert not a.equals(b)
    b.fill(1)
    b._memory[3:256] = 0  # between the tensors: not sent, not compared
    assert a.equals(b)
    b.tensors[1][4] += 1
    assert not a.equals(b)


# --- what can run where


def test_machines() -> None:
    assert ONE_GPU.devices == ("cuda:0",) * 3
    assert [m.processes for m in (HOST, ONE_GPU, TWO_GPUS, FOUR_GPUS)] == [0, 1, 2, 4]
    assert [m.shared for m in (HOST, ONE_GPU, TWO_GPUS)] == [True, True, False]
    with pytest.raises(BenchError, match="no device"):
        Machine.of([])


def reason(case: str, way: str, machine: Machine) -> str | None:
    return cases.find(case)[0].left_out(machine, ways.find(way)[0])


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "cuda_built", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    assert reason("latency", "nccl", ONE_GPU) == (
        "needs two GPUs: NCCL cannot put two ranks on one GPU"
    )
    assert "needs two GPUs" in (reason("latency", "symmetric", ONE_GPU) or "")
    assert reason("latency", "hosts", ONE_GPU) == reason("latency", "nccl", ONE_GPU)
    assert reason("fan-out", "nccl", TWO_GPUS) == "needs 3 GPUs: one for each of 3 ranks"
    assert reason("bidirectional", "nccl-broadcast", TWO_GPUS) == "a broadcast has one direction"
    assert "needs a GPU" in (reason("latency", "kernel", HOST) or "")
    assert "needs a GPU" in (reason("enqueue", "auto", HOST) or "")
    for way in ("auto", "inline", "kernel", "copy", "memcpy"):
        for case in cases.CASES:
            assert case.left_out(ONE_GPU, ways.known()[way]) is None
    for way in ("nccl", "symmetric", "hosts"):
        for case in cases.CASES:
            assert case.left_out(FOUR_GPUS, ways.known()[way]) is None
    monkeypatch.setattr(core, "cuda_built", lambda: False)
    assert "without CUDA" in (reason("latency", "auto", ONE_GPU) or "")


def test_cases_run_in_the_order_of_a_run() -> None:
    assert [c.key for c in cases.find("bandwidth, latency")] == ["latency", "bandwidth"]
    assert len({c.key for c in cases.CASES}) == len(cases.CASES)


# --- measuring, on the host


@pytest.fixture
def world() -> Iterator[HostWorld]:
    world = HostWorld(HOST)
    yield world
    world.close()


def measure(world: Any, case: str, way: str, **options: Any) -> list[Figure | LeftOut]:
    bench = Bench(world, settings(**options), time.time() + 60)
    return list(cases.find(case)[0].run(bench, ways.known()[way]))


@pytest.mark.parametrize("case", ["latency", "bundles", "bandwidth", "bidirectional", "fan-out"])
def test_cases_on_the_host(world: HostWorld, case: str) -> None:
    found = measure(world, case, "auto")
    assert found
    for figure in found:
        assert isinstance(figure, Figure), figure
        assert figure.value.rounds == 2
        assert figure.value.median > 0
        assert figure.gb_per_s is not None
    if case == "fan-out":
        assert figure.moved == 2 * figure.nbytes


def test_wrong_data_is_a_failure_and_costs_the_others_nothing(
    world: HostWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = ChannelLink.source

    def stale(self: ChannelLink, n: int) -> Any:
        return sound(self, 0 if self.payload.name == "1K" and self._echoed is None else n)

    monkeypatch.setattr(ChannelLink, "source", stale)
    first, second = measure(world, "latency", "auto")
    assert isinstance(first, LeftOut) and first.failed
    assert first.reason == "wrong data arrived"
    assert isinstance(second, Figure)


def test_an_error_in_one_thread_is_that_error(
    world: HostWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: ChannelLink, receiver: int, n: int, stream: Any) -> None:
        raise RuntimeError("a cosmic ray")

    monkeypatch.setattr(ChannelLink, "receive", broken)
    begun = time.monotonic()
    found = measure(world, "bidirectional", "auto", sizes="1K")
    assert [getattr(x, "reason", None) for x in found] == ["a cosmic ray"]
    assert time.monotonic() - begun < 5


def test_nothing_is_begun_when_the_time_is_up(world: HostWorld) -> None:
    bench = Bench(world, settings(), time.time() - 1)
    found = list(cases.find("latency")[0].run(bench, ways.known()["auto"]))
    assert [getattr(x, "reason", None) for x in found] == ["no time left"] * 2


# --- the code for GPUs, with streams that do everything at once


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> CudaWorld:
    fake_cuda.install(monkeypatch)
    monkeypatch.setattr(exposed, "_WIDTH", 32)
    monkeypatch.setattr(exposed, "_TICK", 1e-4)
    return CudaWorld(HOST)


@pytest.mark.parametrize("way", ["auto", "push", "memcpy"])
@pytest.mark.parametrize("case", [c.key for c in cases.CASES])
def test_programs_on_streams_and_in_graphs(fake: CudaWorld, case: str, way: str) -> None:
    if case == "enqueue" and way != "memcpy":
        pytest.skip("puts on the host wait for the receiver")
    found = measure(fake, case, way, bundles="18x256K")
    assert found
    assert all(isinstance(f, Figure) for f in found), found
    launches = {f.launch for f in found}
    if case in ("latency", "bundles"):
        assert launches == {"graph", "eager"}
    if case == "exposed":
        details = [getattr(f, "details", {}) for f in found]
        assert {d["load"] for d in details} == {"a bundle a tick", "back to back"}


def test_a_gate_that_opened_too_early_is_closed_for_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_cuda.install(monkeypatch)
    slept: list[int] = []
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    opened = iter([True, True, False])
    monkeypatch.setattr(fake_cuda.Event, "query", lambda self: next(opened))
    closed = gate.Gate(fake_cuda.Stream())  # type: ignore[arg-type]
    rounds: list[None] = []
    seconds = closed.round(lambda: rounds.append(None), lambda held: held, lambda: None)
    assert len(rounds) == 3 and seconds > 0
    assert slept[2:] == [2 * slept[1], 4 * slept[1]]
    monkeypatch.setattr(fake_cuda.Event, "query", lambda self: True)
    with pytest.raises(BenchError, match="could not be enqueued"):
        closed.round(lambda: None, lambda held: held, lambda: None)


@pytest.mark.slow
def test_several_processes(tmp_path: Path) -> None:
    """NCCL's links over gloo, on the CPU: who sends and receives what, and in which order."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    out = tmp_path / "out"
    pairs = (
        ("latency", "nccl"), ("bundles", "nccl-broadcast"), ("exposed", "nccl"),
        ("bidirectional", "nccl"), ("fan-out", "nccl-broadcast"),
    )  # fmt: skip
    machine = Machine(("cpu", "cpu"))
    Job(settings(machine, sizes="1K"), pairs, str(out), store.port).write(tmp_path / "job")
    command = [sys.executable, str(WORKER), str(tmp_path / "job")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    children = [subprocess.Popen([*command, str(r)], env=environment) for r in range(2)]
    try:
        store.set("go", "go")
        assert [c.wait(60) for c in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
    lines = [json.loads(x) for x in out.read_text().splitlines()]
    assert [tuple(x["done"]) for x in lines if "done" in x] == list(pairs)
    assert not [x for x in lines if "left_out" in x]
    sides = {x["figure"]["details"].get("side") for x in lines if "figure" in x}
    assert {"sender", "receiver"} <= sides


def test_signals_of_symmetric_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who signals what on which of torch's channels; the signals themselves need two GPUs."""
    from torch.distributed import _symmetric_memory

    from asyncdiff_bench.links import symmetric

    peer = torch.zeros(4096, dtype=torch.uint8)
    calls: list[Any] = []

    class Handle:
        def get_buffer(self, rank: int, size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return peer[: size[0]]

        def put_signal(self, rank: int, channel: int, timeout_ms: int) -> None:
            calls.append(("put", rank, channel, int(peer.sum()) > 0))

        def wait_signal(self, rank: int, channel: int, timeout_ms: int) -> None:
            calls.append(("wait", rank, channel, int(peer.sum()) > 0))

    fake_cuda.install(monkeypatch)
    everyone = types.SimpleNamespace(group=types.SimpleNamespace(WORLD="everyone"))
    monkeypatch.setattr(symmetric, "dist", everyone)
    monkeypatch.setattr(
        _symmetric_memory, "empty", lambda n, **_: torch.zeros(n, dtype=torch.uint8)
    )
    monkeypatch.setattr(_symmetric_memory, "rendezvous", lambda *_: Handle())
    links = [
        symmetric.SymmetricLink(CudaWorld(HOST, [r]), 0, [1], payload.of_size(1000), 2)
        for r in range(2)
    ]
    assert calls == [("put", 0, 2, False), ("put", 0, 3, False)]  # the receiver's slots are free
    calls.clear()
    links[0].refill(1)
    links[0].send(3, None)
    links[1].receive(1, 3, None)
    links[1].release(1, 3, None)
    assert calls == [
        ("wait", 1, 3, False), ("put", 1, 1, True), ("wait", 0, 1, True), ("put", 0, 3, True)
    ]  # fmt: skip
    assert torch.equal(peer[1024:2024], links[0].source(3).raw[0])


# --- processes that die or hang


def run_with(python: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Results:
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(runner.sys, "executable", str(python))
    return runner.run(
        settings(sizes="1K", bundles="18x256K", **options),
        cases.find("latency,bundles,bandwidth"),
        ways.find("auto"),
    )


@pytest.mark.slow
def test_a_dead_process_costs_one_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, mark = sys.executable, tmp_path / "mark"
    script = tmp_path / "python"
    script.write_text(
        f'#!/bin/sh\nif [ -e {mark} ]; then exec {real} "$@"; fi\n'
        f"touch {mark}; echo out of luck >&2; exit 3\n"
    )
    results = run_with(script, monkeypatch)
    assert [(x.case, x.reason) for x in results.failed] == [
        ("latency", "process 0 of the measurement ended with 3: out of luck")
    ]
    assert {f.case for f in results.figures} == {"bundles", "bandwidth"}


def test_a_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexec sleep 100\n")
    monkeypatch.setattr(runner, "_START", 0.2)
    monkeypatch.setattr(runner, "_GRACE", 0.2)
    begun = time.monotonic()
    results = run_with(script, monkeypatch, seconds=0.1)
    assert time.monotonic() - begun < 5
    assert [x.case for x in results.failed] == ["latency", "bundles", "bandwidth"]
    assert results.failed[0].reason == "the measurement did not end in time"


# --- what people get


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)

    def call(*argv: Any) -> tuple[int, str, str]:
        code = main(["bench", "exchange", *map(str, argv)])
        out, err = capfd.readouterr()
        return code, out, err

    return call


def test_the_whole_command(run: Any, tmp_path: Path) -> None:
    out, png = tmp_path / "new" / "exchange.json", tmp_path / "exchange.png"
    quick = ("--devices", "cpu", "--rounds", 2, "--sizes", "1K,64K")
    code, text, err = run(*quick, "--out", out, "--png", png)
    assert code == 0, err
    for title in ("latency, µs one way", "bandwidth, GB/s", "fan-out", "left out", "needs a GPU"):
        assert title in text
    assert "latency: auto (1 of " in err
    assert png.read_bytes()[:4] == b"\x89PNG"
    document = json.loads(out.read_text())
    assert document["environment"]["core"]
    results = Results.from_dict(document["figures"])
    assert not results.failed
    assert {f.case for f in results.figures} == {
        "latency", "bundles", "bandwidth", "bidirectional", "fan-out"
    }  # fmt: skip


def test_json_is_all_there_is_on_stdout(run: Any) -> None:
    code, text, _ = run(
        "--devices", "cpu", "--rounds", 1, "--sizes", "1K", "--cases", "latency",
        "--ways", "auto,nccl", "--json",
    )  # fmt: skip
    data = json.loads(text)
    assert code == 0
    assert [f["payload"] for f in data["figures"]["figures"]] == ["1K"]
    assert [x["way"] for x in data["figures"]["left_out"]] == ["nccl"]


def test_a_failure_is_exit_code_1(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "run", lambda *_: made_up())
    code, text, _ = run("--devices", "cpu")
    assert code == 1
    assert "FAILED: wrong data arrived" in text


def test_list(run: Any) -> None:
    code, text, _ = run("--devices", "cpu", "--list")
    assert code == 0
    assert all(c.key in text for c in cases.CASES)
    assert all(w in text for w in ways.known())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--cases", "speed"], "known are latency, bundles"),
        (["--ways", "pigeon"], "known are auto, inline"),
        (["--bundles", "sd9"], "known are 18x256K, sd21-N2, sdxl-N2"),
        (["--sizes", "big"], "write 16K"),
        (["--rounds", "0"], "rounds is at least 1"),
        (["--seconds", "0"], "has to be positive"),
        (["--cases", "enqueue", "--png", "x.png"], "nothing to draw"),
        (["--devices", "tpu"], "'tpu' is not a device"),
        (["--devices", "cpu,cuda:0"], "mixes"),
    ],
)
def test_mistakes_are_exit_code_2_and_name_what_is_known(
    run: Any, argv: list[str], said: str
) -> None:
    code, text, err = run("--devices", "cpu", *argv)
    assert (code, text) == (2, "")
    assert said in err and "Traceback" not in err


def test_table_and_plot(tmp_path: Path) -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(made_up()))
    text = console.export_text()
    assert "asyncdiff (graph)" in text and "NCCL broadcast (eager)" in text
    assert "matmuls of the sender" in text and "1.50 (1.50 to 1.50)" in text
    assert "FAILED: wrong data arrived" in text
    # Values between two powers of ten have labels, too.
    for axes in picture(made_up()).axes:
        low, high = axes.get_ylim()
        labels = [t.get_text() for t in axes.get_yticklabels()]
        shown = [y for y, text in zip(axes.get_yticks(), labels, strict=True) if text]
        assert [y for y in shown if low <= y <= high], axes.get_ylabel()
    draw(made_up(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    with pytest.raises(BenchError, match="nothing to draw"):
        draw(Results(("cpu",)), tmp_path / "none.png")
    assert [digits(x) for x in (0.123, 9.876, 12.34, 389.2)] == ["0.12", "9.88", "12.3", "389"]


def test_the_table_of_the_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.exchange() == ""
    environment = {
        "gpus": ["NVIDIA H200"] * 2, "torch": "2.11.0", "command": "run.py --quick"
    }  # fmt: skip
    document = {"environment": environment, "figures": made_up().to_dict()}
    (tmp_path / "exchange_2gpu.json").write_text(json.dumps(document))
    text = tables.exchange()
    assert "2 × NVIDIA H200" in text and "`benchmarks/exchange/run.py --quick`" in text
    assert "| one way in a CUDA graph, µs | 64K | 1M | sd21-N2 |" in text
    assert "| asyncdiff | 7.55 | 106 | 6001 |" in text
    assert "| NCCL broadcast |" in text and "eager" not in text.split("|")[0]


def test_the_command_says_where_the_benchmark_is_missing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "asyncdiff_bench"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "asyncdiff_bench", None)
    assert main(["bench", "exchange", "--list"]) == 2
    assert "asyncdiff_bench" in (err := capfd.readouterr().err) and "pip install" in err
