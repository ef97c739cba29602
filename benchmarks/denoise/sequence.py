"""Measure exact steps whose tokens are shared out among GPUs, beside the same denoiser on one GPU.

    python benchmarks/denoise/sequence.py                              # FLUX, SD3, Wan on two GPUs
    python benchmarks/denoise/sequence.py --models flux --compile graphs regions --ranks 2
    python benchmarks/denoise/sequence.py --models sd3 --shares joint even --warmup 0
    python benchmarks/denoise/sequence.py --device cpu --dtype float32 --models tiny-flux  # a try

For each model, without guidance (one condition, one call a step; as usual with ``--guided``, of
which one GPU has all), as it is in CUDA graphs and compiled by regions: all steps on one GPU
(``components=1``), all steps by tokens (``schedule="sequence"``), and ``--steps`` steps with
``--warmup`` exact ones, all but the last of these by tokens (``exact_mode="sequence"``), and as a
chain. ``--shares``: GPUs have as many tokens each, of all streams together (``joint``) or of each
stream (``even``); both in one run to compare them. Loops alternate in ``--rounds`` rounds;
reported are milliseconds of a step and how many times the speed of one GPU in the same mode and
round (median, smallest, largest), what crosses, how far the result of exact steps is from the plain
module's, and milliseconds of each rank's graph alone, without any exchange. With ``--seconds`` it
stops by itself; what is measured is written after every round. With ``--lock FILE`` runs beside
each other prepare together, and time alone.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import results_file
from asyncdiff.partition.shards import shards
from asyncdiff.runtime.cutting import cutter
from asyncdiff.sequence.shares import Decide, even, joint
from denoise.beside import Lock
from denoise.models import MODELS, TRIES
from denoise.settings import Setting
from denoise.timings import Timings, synchronize
from denoise.ways import Asynchronous, Eager, Team, component_times

KNOWN = MODELS | TRIES
SHARES: dict[str, Decide] = {"joint": joint, "even": even}
COMPILE: dict[str, bool | str] = {"graphs": False, "regions": "regions"}
OUT = Path(os.environ.get("OUT", results_file.ROOT / "benchmarks" / "results"))
#: Seconds of loops before those that are timed.
WARM_S = 1.0
#: Steps of the loop whose result is compared with the plain module's.
FEW = 3
#: A setting, and how its tokens are shared out.
Row = tuple[Setting, str]


def settings(ranks: int, warmup: int, steps: int, kinds: Sequence[str]) -> dict[str, Row]:
    """What is timed, by the name of its row."""
    out = {"one GPU": (Setting(1, 1, 1), "joint")}
    said = {kind: "" if kind == "joint" else f", {kind} shares" for kind in kinds}
    for kind in kinds:
        setting = Setting(ranks, 1, 1, sequence=True)
        out[f"{ranks} GPUs, tokens{said[kind]}"] = setting, kind
    if 0 < warmup < steps:
        out[f"{ranks} GPUs, w={warmup}, chain"] = Setting(ranks, 1, warmup), "joint"
        for kind in kinds:
            setting = Setting(ranks, 1, warmup, sequence_warmup=True)
            out[f"{ranks} GPUs, w={warmup}, tokens{said[kind]}"] = setting, kind
    return out


@contextlib.contextmanager
def shared_out(kind: str) -> Iterator[None]:
    """Whatever is prepared meanwhile shares out its tokens so."""
    plain = cutter.shards
    cutter.shards = functools.partial(shards, decide=SHARES[kind])
    try:
        yield
    finally:
        cutter.shards = plain


def of_one(value: Any) -> Any:
    """Of an input that has two conditions the first one."""
    if isinstance(value, dict):
        return {name: of_one(x) for name, x in value.items()}
    return (
        value[:1].clone() if isinstance(value, torch.Tensor) and value.shape[:1] == (2,) else value
    )


def measure(args: argparse.Namespace, key: str, compile: str, save: Any, lock: Lock) -> None:
    """The rows of one model in one mode; ``save`` is given them whenever there are more."""
    lock.prepare()
    model = KNOWN[key] if args.guided else dataclasses.replace(KNOWN[key], branches=1)
    gpus = torch.cuda.device_count() if args.device == "cuda" else 0
    home = "cuda:0" if gpus else "cpu"
    module = model.build(home, getattr(torch, args.dtype))
    inputs = model.inputs(module)
    if not args.guided:
        inputs = {name: of_one(value) for name, value in inputs.items()}
    plain = Timings()
    plain.take(Eager(module), model.loop(inputs, FEW))
    module.to("cpu")
    rows: dict[str, Any] = {}
    ways: dict[str, Asynchronous] = {}
    teams: dict[Any, Team] = {}
    timings: dict[str, Timings] = {}
    timed = model.loop(inputs, args.steps)
    for name, (setting, kind) in settings(args.ranks, args.warmup, args.steps, args.shares).items():
        if args.over():
            print(f"{key}, {compile}, {name}: no time was left", flush=True)
            continue
        lock.prepare()
        devices = [f"cuda:{r % gpus}" if gpus else "cpu" for r in range(setting.ranks)]
        begun = time.perf_counter()
        loop = model.loop(inputs, FEW)
        result = Timings()
        with shared_out(kind):
            team = setting.team, kind
            if team not in teams:
                teams[team] = Team(module, loop, setting, devices, COMPILE[compile])
            way = Asynchronous(teams[team], setting)
            exact = Asynchronous(teams[team], dataclasses.replace(setting, warmup=FEW))
            result.take(exact, loop)
            lock.time()
            # Clocks rise in the first second of work, and one round may be all there is time for.
            warm, few = time.perf_counter(), model.loop(inputs, min(args.steps, args.warmup + 4))
            while time.perf_counter() - warm < WARM_S:
                way.run(few)
                synchronize()
        row = rows[name] = {
            "devices": devices,
            "shared_gpus": gpus < setting.ranks,
            "prepare_s": round(time.perf_counter() - begun, 1),
            "exchange_mib_per_step": round(
                way.denoiser.report().exchange_bytes_per_tick / 2**20, 2
            ),
            "distance_to_plain": result.distance(plain),
            "steps": args.steps,
            "commit": results_file.commit(),
        }
        if gpus:
            row["rank_ms_alone"] = [round(t, 3) for t in component_times(way.denoiser)]
        ways[name], timings[name] = way, Timings()
        timings[name].take(way, timed)  # the first round, at once: there may be no time for others
        rows[name] |= timings[name].figures(args.steps)
        rows[name]["speedup"] = timings[name].ratios(timings["one GPU"])
        print(f"{key}, {compile}, {name}: {row}", flush=True)
        save(rows)
    for _ in range(1, args.rounds):
        if args.over():
            break
        for name, way in ways.items():
            timings[name].take(way, timed)
        for name in ways:
            rows[name] |= timings[name].figures(args.steps)
            rows[name]["speedup"] = timings[name].ratios(timings["one GPU"])
        save(rows)
    lock.free()
    for name, row in rows.items():
        print(f"{key}, {compile}, {name}: {row.get('ms_a_step')} {row.get('speedup')}", flush=True)
    for team in teams.values():
        team.denoiser.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["flux", "sd3", "wan"], choices=KNOWN)
    parser.add_argument("--compile", nargs="+", default=["graphs", "regions"], choices=COMPILE)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shares", nargs="+", default=["joint"], choices=SHARES)
    parser.add_argument("--guided", action="store_true", help="with both conditions of guidance")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a try-out")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--lock", type=Path, help="of runs beside each other: see above")
    parser.add_argument("--out", type=Path, default=OUT / "sequence.json")
    args = parser.parse_args()
    if args.device == "cuda":  # where ranks share a GPU; CUDA reads it when it starts
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    lock, started = Lock(args.lock), time.monotonic()
    args.over = lambda: time.monotonic() - started > args.seconds
    figures = results_file.continued(args.out)
    for key in args.models:
        entry = figures.setdefault(key, {"title": KNOWN[key].title})
        entry |= {"steps": args.steps, "dtype": args.dtype, "guided": args.guided}
        for compile in args.compile:
            if args.over():
                print(f"{key}, {compile}: no time was left", flush=True)
                continue

            def save(rows: dict[str, Any], entry: Any = entry, compile: str = compile) -> None:
                entry[compile] = rows
                results_file.write(args.out, figures)

            measure(args, key, compile, save, lock)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
