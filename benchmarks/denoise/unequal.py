"""Two GPUs of which one is slower: how close steps come to the sum of their speeds.

    python benchmarks/denoise/unequal.py --model sdxl --share 0.6 --out out/unequal.json

A second process takes time from the second GPU, until the whole denoiser, in one CUDA graph there,
runs at the wanted share of its speed. Processes share a GPU by time slices, in which all of its
multiprocessors are one process's; so it is the length of its pauses that is sought, and what is
known in the end is the share that was measured, with which the ideal is counted: a step on the
first GPU over 1 + that share. Nothing of the GPU is set.

Then the denoiser runs in two components, cut as for equal GPUs; by itself, which times components
and finds the slower GPU out; and with the speeds given by hand. A step is what a further one takes,
from loops of two lengths. ``--devices cpu cpu --model tiny`` tries it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import asyncdiff
import results_file
from denoise.models import MODELS, TRIES
from denoise.settings import Setting
from denoise.timings import timed
from denoise.ways import Asynchronous, Eager, Graphed

#: Milliseconds for which the other process works before it pauses.
_BUSY = 2.0
#: Times that a pause is tried, and how close to the wanted share it has to come.
_TRIALS, _CLOSE = 10, 0.01
_SETTING = Setting(2, 1, 1)


# ---- the other process ---------------------------------------------------------------------------


def occupy(device: torch.device) -> None:
    """Work and pause in turns, until the input ends; each of its lines has a pause in ms (negative:
    all is a pause)."""
    import select

    cuda, pause, cycles = device.type == "cuda", -1.0, 0
    if cuda:
        torch.cuda.set_device(device)
        cycles = _cycles_a_ms()
    print("ready", flush=True)
    while True:
        if select.select([sys.stdin], [], [], 0)[0]:
            line = sys.stdin.readline()
            if not line:
                return
            pause = float(line)
            print("set", flush=True)
        if pause < 0:
            time.sleep(0.005)
        elif cuda:
            torch.cuda._sleep(int(_BUSY * cycles))
            torch.cuda.synchronize()
        else:
            until = time.perf_counter() + _BUSY / 1e3
            while time.perf_counter() < until:
                pass
        if pause > 0:
            time.sleep(pause / 1e3)


def _cycles_a_ms() -> int:
    """Of torch's kernel that spins."""
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1000)
    torch.cuda.synchronize()
    begun.record()
    torch.cuda._sleep(10_000_000)
    ended.record()
    torch.cuda.synchronize()
    return int(10_000_000 / begun.elapsed_time(ended))


class Occupier:
    """A process that takes time from a device; see :func:`occupy`."""

    def __init__(self, device: str) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--occupy", device]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer("ready")

    def pause(self, ms: float) -> None:
        """Let it work with pauses of so many milliseconds (negative: not at all)."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{ms}\n")
        self._process.stdin.flush()
        self._answer("set")

    def _answer(self, wanted: str) -> None:
        assert self._process.stdout is not None
        said = self._process.stdout.readline().strip()
        if said != wanted:
            raise SystemExit(f"the process that takes time from the GPU ended: {said!r}")

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


@contextlib.contextmanager
def occupied(device: str) -> Iterator[Occupier]:
    other = Occupier(device)
    try:
        yield other
    finally:
        other.close()


# ---- what is measured ----------------------------------------------------------------------------


def find_pause(
    share_at: Callable[[float], float], wanted: float, most: float = 64.0
) -> tuple[float, float]:
    """The pause in ms with which the device has the ``wanted`` share of its speed, and the share
    that it has: ``share_at`` measures it, and the longer the pause, the larger it is. The closest
    of those tried, where none is close."""
    low, high = 0.0, most
    tried: list[tuple[float, float]] = []
    for _ in range(_TRIALS):
        pause = (low + high) / 2
        share = share_at(pause)
        tried.append((pause, share))
        if abs(share - wanted) <= _CLOSE:
            break
        low, high = (pause, high) if share < wanted else (low, pause)
    return min(tried, key=lambda t: abs(t[1] - wanted))


def of_ideal(whole_ms: float, shares: Sequence[float], step_ms: float) -> float:
    """How much of the ideal a step is: on devices of these shares of the speed of one on which it
    takes ``whole_ms`` it would take that over their sum."""
    return whole_ms / sum(shares) / step_ms


def loop_ms(way: Any, loop: Any, rounds: int) -> float:
    """Milliseconds of a loop, the median."""
    return statistics.median(timed(way, loop)[0] for _ in range(rounds))


def step_ms(loops: Sequence[Any], each_ms: Sequence[float]) -> float:
    """Milliseconds of a further step, from those of loops of two lengths."""
    few, many = each_ms
    lengths = [len(loop.timesteps) for loop in loops]
    return max(many - few, 1e-3) / (lengths[1] - lengths[0])


@contextlib.contextmanager
def decisions() -> Iterator[list[str]]:
    """What is logged meanwhile of components that are timed: their runs, and what was made of
    them."""
    told: list[str] = []

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.module in ("runs", "rebalance"):
                told.append(record.getMessage())

    log, handler = logging.getLogger("asyncdiff"), Told()
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield told
    finally:
        log.setLevel(before)
        log.removeHandler(handler)


def measure(args: argparse.Namespace, other: Occupier) -> dict[str, Any]:
    """Shares, steps of each way, and how much of the ideal they are."""
    model = (MODELS | TRIES)[args.model]
    cuda = args.devices[0].startswith("cuda")
    dtype = torch.float16 if cuda else torch.float32
    whole: dict[str, float] = {}
    shares: dict[str, float] = {}

    def alone(device: str) -> None:
        """The whole denoiser there, and the pause that leaves it the wanted share."""
        module = model.build(device, dtype)
        inputs = model.inputs(module)
        one: Any = Graphed(module) if cuda else Eager(module)
        loops = [model.loop(inputs, steps) for steps in args.steps]
        one.run(loops[0])
        undisturbed = [loop_ms(one, loop, args.rounds) for loop in loops]
        whole[device] = step_ms(loops, undisturbed)
        if device != args.devices[1]:
            return

        def share_at(pause: float) -> float:
            other.pause(pause)
            return undisturbed[0] / loop_ms(one, loops[0], 1)

        # It is sought by few steps, and what it leaves is measured by many.
        pause, _ = find_pause(share_at, args.share)
        other.pause(pause)
        share = undisturbed[1] / loop_ms(one, loops[1], args.rounds)
        other.pause(-1)
        shares.update(pause_ms=round(pause, 3), share=round(share, 4))

    for device in dict.fromkeys(args.devices):
        with torch.cuda.device(device) if cuda else contextlib.nullcontext():
            alone(device)
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    first = whole[args.devices[0]]
    # The second one's speed by the first's, when nobody takes time from it.
    equal = first / whole[args.devices[1]]
    share = shares["share"] * equal
    module = model.build("cpu", dtype)
    module = module.to(args.devices[0]) if cuda else module
    inputs = model.inputs(module)
    loops = [model.loop(inputs, steps) for steps in args.steps]
    found: dict[str, Any] = {"whole_ms": whole, **shares, "share_of_first": round(share, 4)}

    def run(name: str, **options: Any) -> tuple[str, ...]:
        with decisions() as decided:
            denoiser = asyncdiff.AsyncDenoiser(
                copy.deepcopy(module).to("cpu") if cuda else module,
                (),
                inputs,
                devices=args.devices,
                components=2,
                compile=args.compile,
                **options,
            )
            way = Asynchronous(
                argparse.Namespace(denoiser=denoiser),  # type: ignore[arg-type]
                _SETTING,
            )
            way.run(loops[0])
        ms = step_ms(loops, [loop_ms(way, loop, args.rounds) for loop in loops])
        report, parts = denoiser.report(), denoiser.partition
        found[name] = {
            "step_ms": round(ms, 3),
            "of_ideal": round(of_ideal(first, [1.0, share], ms), 4),
            "speeds": report.speeds,
            "memory": report.memory,
            "cuts": parts.cuts,
            "costs": parts.report().source,
            "decided": decided,
        }
        denoiser.close()
        print(f"{name}: {found[name]['step_ms']} ms a step", flush=True)
        return parts.cuts or ()

    run("both alone")
    found["both alone"]["of_ideal"] = round(
        of_ideal(first, [1.0, equal], found["both alone"]["step_ms"]), 4
    )
    other.pause(shares["pause_ms"])
    run("cut as for equal ones", split=list(found["both alone"]["cuts"]))
    run("found out")
    run("by hand", speeds=[1.0, share])
    other.pause(-1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="sdxl", choices=[*MODELS, *TRIES])
    parser.add_argument("--devices", nargs=2, default=["cuda:0", "cuda:1"])
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--steps", type=int, nargs=2, default=[10, 40])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out/unequal.json"))
    parser.add_argument("--occupy", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.occupy:
        occupy(torch.device(args.occupy))
        return
    os.environ["ASYNCDIFF_CACHE"] = "off"  # a cut that is kept is not looked for again
    with occupied(args.devices[1]) as other:
        found = measure(args, other)
    figures = results_file.continued(args.out)
    figures[f"{args.model}{', compiled' if args.compile else ''}"] = found
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results_file.write(args.out, figures)
    print(f"the second device has {100 * found['share']:.1f} % of its speed")
    for name in ("both alone", "cut as for equal ones", "found out", "by hand"):
        way = found[name]
        print(f"{name}: {way['step_ms']:.2f} ms a step, {way['of_ideal']:.3f} of the ideal")


if __name__ == "__main__":
    main()
