"""How much longer compute takes with the exchange beside it, and the exchange beside compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..bench import Bench, figure
from ..cuda_world import CudaWorld
from ..figures import Figure
from ..links.link import Link
from ..payload import Payload
from ..program import Program, Step, receive, signal
from ..settings import Settings
from ..ways import Way
from .case import Case, bundles, needs_gpu

_SLOTS = 2
_TICK = 0.010  # seconds of matmuls: about a component of a UNet on one of two GPUs
_WIDTH = 4096  # of the matrices; float16, as the denoisers


@dataclass
class _Beside:
    """Matmuls on lane 0 and bundles on lane 1, of the ranks that compute. Each of ``ticks`` has
    ``bundles`` bundles and ``matmuls``, begins both at once and ends with the later, as the ticks
    of a generation do."""

    world: CudaWorld
    link: Link
    go: Link
    answer: Link
    computing: Sequence[int]
    ticks: int = 1
    bundles: int = 0
    matmuls: int = 0
    _matrices: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    _marks: dict[tuple[str, int, int, str], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for rank in self.computing:
            if rank in self.world.local:
                shape = (_WIDTH, _WIDTH)
                device = self.world.devices[rank]
                self._matrices[rank] = [
                    torch.randn(shape, device=device, dtype=torch.float16) for _ in range(3)
                ]
                with self.world.on(self.world.stream(rank)):
                    self._compute(rank, 3)  # loads and chooses the kernel
        self.world.synchronize()

    def _compute(self, rank: int, count: int, stream: Any = None) -> None:
        a, b, out = self._matrices[rank]
        for _ in range(count):
            torch.mm(a, b, out=out)

    def _mark(self, what: str, rank: int, tick: int, edge: str, stream: Any) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        self._marks[what, rank, tick, edge] = event

    def program(self, compute: bool, exchange: bool) -> Program:
        """Compute, exchange, or both at once. Rank 0 says when the others begin."""

        def program(step: Step) -> None:
            signal(step, self.go)
            pair = (self.link.sender, *self.link.receivers)
            for tick in range(self.ticks):
                for rank in pair:
                    step.fork(rank)
                if exchange:
                    self._exchange(step, tick)
                for rank in self.computing if compute else ():
                    step(rank, self._mark, "compute", rank, tick, "begin")
                    step(rank, self._compute, rank, self.matmuls)
                    step(rank, self._mark, "compute", rank, tick, "end")
                for rank in pair:
                    step.join(rank)

        return program

    def _exchange(self, step: Step, tick: int) -> None:
        step(0, self._mark, "exchange", 0, tick, "begin", lane=1)
        for i in range(self.bundles):
            step(0, self.link.send, tick * self.bundles + i, lane=1)
            receive(step, self.link, tick * self.bundles + i, lane=1)
        signal(step, self.answer, send_lane=1, receive_lane=1)
        step(0, self._mark, "exchange", 0, tick, "end", lane=1)

    def run(self, compute: bool, exchange: bool) -> dict[str, float]:
        """Seconds of each rank's computation, and of the exchange, the sum of all ticks."""
        program = self.program(compute, exchange)
        self.world.gated(lambda: self.world.issue(program))
        mine: dict[str, float] = {}
        for (what, rank, tick, edge), event in self._marks.items():
            if edge == "begin":
                end = self._marks[what, rank, tick, "end"]
                key = f"{what} {rank}"
                mine[key] = mine.get(key, 0.0) + event.elapsed_time(end) / 1e3
        self._marks.clear()
        return {k: v for part in self.world.gather(mine) for k, v in part.items()}

    def matmul_seconds(self) -> float:
        """Of one matmul on rank 0."""
        self.matmuls = 20
        return self.run(True, False)["compute 0"] / self.matmuls / self.ticks


def _measure(bench: Bench, way: Way, payload: Payload) -> Iterator[Figure]:
    world = bench.world
    assert isinstance(world, CudaWorld)
    # Ranks that share a GPU would compute one after the other, not beside each other.
    computing = (0,) if world.machine.shared else (0, 1)
    link = bench.link(way, 0, [1], payload, _SLOTS)
    go, answer = bench.signal(way, 0, 1), bench.signal(way, 1, 0)
    beside = _Beside(world, link, go, answer, computing)
    beside.bundles = _SLOTS
    world.issue(beside.program(compute=False, exchange=True))  # loads and connects everything
    world.synchronize()
    each = beside.run(False, True)["exchange 0"] / beside.bundles
    matmul = beside.matmul_seconds()

    # As in a generation: a bundle a tick.
    beside.ticks, beside.bundles = _SLOTS, 1
    beside.matmuls = max(1, round(_TICK / matmul))
    yield from _compare(bench, way, payload, beside, "a bundle a tick")
    # As many as there is time for.
    operations = len(payload.specs) + 2
    most = max(_SLOTS, 200 // operations // _SLOTS * _SLOTS)
    beside.ticks, beside.bundles = 1, min(most, 32)
    beside.matmuls = max(10, round(each * beside.bundles / matmul))
    yield from _compare(bench, way, payload, beside, "back to back")


def _compare(
    bench: Bench, way: Way, payload: Payload, beside: _Beside, load: str
) -> Iterator[Figure]:
    """Each round runs compute alone, the exchange alone, and both; ratios are within a round."""
    slower: dict[str, list[float]] = {}
    alone: dict[str, list[float]] = {}
    for i in range(bench.settings.rounds + 1):
        separate = beside.run(True, False) | beside.run(False, True)
        seed = bench.refill([beside.link])
        both = beside.run(True, True)
        bench.check([beside.link], seed, beside.ticks * beside.bundles)
        for key in both if i else ():
            slower.setdefault(key, []).append(100 * (both[key] / separate[key] - 1))
            alone.setdefault(key, []).append(separate[key] * 1e6)
    sides = {"compute 0": "sender", "compute 1": "receiver"}
    for key, values in slower.items():
        what = "compute_slower" if key in sides else "exchange_slower"
        yield figure(
            "exposed", way, "eager", payload, what, values, "%",
            side=sides.get(key), load=load, bundles=beside.ticks * beside.bundles,
            alone_us=round(sorted(alone[key])[len(alone[key]) // 2], 1),
        )  # fmt: skip


def _payloads(settings: Settings) -> list[Payload]:
    # Published denoisers' bundles: of others nobody knows what computes beside them.
    # One is enough: a larger one is the same for longer.
    chosen = [p for p in bundles(settings) if p.name.endswith("-N2")]
    return chosen[:1] or bundles(settings)[:1]


CASE = Case(
    "exposed", "slowdown of matmuls by the exchange beside them, and of the exchange", _payloads,
    _measure, needs_gpu,
)  # fmt: skip
