"""Time denoising loops on two GPUs over simulated links, with and without compressed exchange.

    python benchmarks/denoise/links.py                          # SDXL and FLUX, five links
    python benchmarks/denoise/links.py --models sdxl --links off 25GB/s,10us 6GB/s,10us,all
    python benchmarks/denoise/links.py --compress none fp8 int8 auto
    python benchmarks/denoise/links.py --device cpu --models tiny-sdxl --dtype float32 --steps 4 8

Random weights at the published sizes, N=2, stride 1, one exact step, as in ``run.py``. Each link
(``ASYNCDIFF_LINK``; "off" is the real one, which comes first) and each way of compressing has an
engine of its own, which is cut for it; two loops of different lengths then say what a tick takes:

* ``tick_ms``: what a further step takes (a step is a tick here), by the two lengths, round by
  round;
* ``exposed_ms``, ``exposed_share``: by how much sending outlasts computing on the sender's GPU in a
  tick, and of the tick (on CPUs: what pushing takes);
* ``slower_share``: of the tick, what it takes longer than over the real link without compression;
* ``exchange_mib``: what crosses in a tick.

All of it is marked as simulated, with the link. What ``--out`` has already, from the same machine
and versions, stays in it: a run can be continued. With ``--seconds`` it stops by itself and says
what it left out. The table in docs/guide/links.md is of benchmarks/results/links_2gpu.json.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import asyncdiff_core as core
import results_file
from denoise.loop import Loop
from denoise.models import MODELS, TRIES, Published
from denoise.settings import Setting
from denoise.timings import Timings, spread, synchronize
from denoise.ways import Asynchronous, Team

#: The real link, then PCIe 4 x16, PCIe 3 x8, and Ethernet.
LINKS = {
    "off": "the real link",
    "25GB/s,10us": "PCIe 4 x16: 25 GB/s, 10 µs",
    "6GB/s,10us": "PCIe 3 x8: 6 GB/s, 10 µs",
    "100Gb/s,50us": "100 Gb/s Ethernet, 50 µs",
    "25Gb/s,50us": "25 Gb/s Ethernet, 50 µs",
    "10Gb/s,50us": "10 Gb/s Ethernet, 50 µs",
}
NONE = "none"
KNOWN = MODELS | TRIES
SETTING = Setting(2, 1, 1)
OUT = Path(os.environ.get("OUT", results_file.ROOT / "benchmarks" / "results"))
STARTED = time.monotonic()


@contextlib.contextmanager
def over(link: str) -> Iterator[None]:
    """Fabrics that are made meanwhile simulate this link."""
    before = os.environ.get("ASYNCDIFF_LINK")
    os.environ["ASYNCDIFF_LINK"] = link
    try:
        yield
    finally:
        if before is None:
            del os.environ["ASYNCDIFF_LINK"]
        else:
            os.environ["ASYNCDIFF_LINK"] = before


def measure(
    module: torch.nn.Module, loops: list[Loop], devices: list[str], rounds: int, compress: str
) -> dict[str, Any]:
    """The row of one link, that which is simulated now, and one way of compressing."""
    settings = {} if compress == NONE else {"compress": compress}
    team = Team(module, loops[0], SETTING, devices, False, **settings)
    try:
        way = Asynchronous(team, SETTING)
        for loop in loops:
            way.run(loop)
        synchronize()
        timings = [Timings() for _ in loops]
        for _ in range(rounds):
            for loop, each in zip(loops, timings, strict=True):
                each.take(way, loop)
        return row(timings, [len(loop.timesteps) for loop in loops], way.denoiser)
    finally:
        team.denoiser.close()


def row(timings: list[Timings], steps: list[int], denoiser: Any) -> dict[str, Any]:
    """What the loops of two lengths say."""
    (short, long), (few, many) = timings, steps
    ticks = [(b - a) / (many - few) for a, b in zip(short.ms, long.ms, strict=True)]
    report = denoiser.report()
    out = {
        "simulated": report.simulated_link is not None,
        "link": report.simulated_link,
        "tick_ms": spread(ticks),
        "ms_a_step": spread([t / many for t in long.ms]),
        "exchange_mib": round(report.exchange_bytes_per_tick / 2**20, 3),
        "component_ms": [round(c.ms, 3) for c in denoiser.partition.report().components],
        "cuts": list(denoiser.partition.cuts or ()),
        "cuda_graphs": report.cuda_graphs,
        "commit": results_file.commit(),
    }
    if long.exposed:
        out["exposed_ms"] = spread(long.exposed)
        out["exposed_share"] = round(statistics.median(long.exposed) / out["tick_ms"]["median"], 4)
    return out


def compare(rows: dict[str, dict[str, Any]]) -> None:
    """Adds to rows by link and way of compressing what they take longer than the real link."""
    real = rows.get(name_of("off", NONE))
    for each in rows.values() if real is not None else ():
        tick = each["tick_ms"]["median"]
        each["slower_share"] = round(1 - real["tick_ms"]["median"] / tick, 4)


def name_of(link: str, compress: str) -> str:
    """The key of a row."""
    return f"{link} {compress}"


def run_model(model: Published, args: argparse.Namespace, rows: dict[str, Any], save: Any) -> None:
    """All rows of one model that are missing, as long as there is time."""
    gpus = torch.cuda.device_count() if args.device == "cuda" else 0
    devices = [f"cuda:{r % gpus}" if gpus else "cpu" for r in range(SETTING.ranks)]
    wanted = [(link, how) for link in args.links for how in args.compress]
    wanted = [x for x in wanted if args.again or name_of(*x) not in rows["rows"]]
    if not wanted:
        return
    rows["shared_gpus"] = gpus < SETTING.ranks
    built = model.build("cuda:0" if gpus else "cpu", getattr(torch, args.dtype))
    loops = [model.loop(model.inputs(built), steps) for steps in args.steps]
    module = built.to("cpu")  # each engine takes it from there
    for link, how in wanted:
        if time.monotonic() - STARTED > args.seconds:
            rows.setdefault("left_out", []).append(name_of(link, how))
            print(f"   no time left for {name_of(link, how)}", flush=True)
            continue
        begun = time.monotonic()
        try:
            with over(link):
                found = measure(module, loops, devices, args.rounds, how)
        except Exception as e:  # one that fails costs the others nothing
            rows.setdefault("failed", {})[name_of(link, how)] = f"{type(e).__name__}: {e}"
            print(f"   {name_of(link, how)} failed: {e}", flush=True)
            continue
        rows["rows"][name_of(link, how)] = found | {"title": LINKS.get(link, link), "compress": how}
        compare(rows["rows"])
        save()
        shown = {k: v for k, v in found.items() if k not in ("cuts", "commit", "title")}
        print(f"   {name_of(link, how)}, {time.monotonic() - begun:.0f} s: {shown}", flush=True)
        gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["sdxl", "flux"], choices=KNOWN)
    parser.add_argument("--links", nargs="+", default=list(LINKS), help="as ASYNCDIFF_LINK")
    parser.add_argument("--compress", nargs="+", default=[NONE, "fp8"])
    parser.add_argument("--steps", type=int, nargs=2, default=[10, 30])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a try-out")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--again", action="store_true", help="measure anew what there is")
    parser.add_argument("--out", type=Path, default=OUT / "links_2gpu.json")
    args = parser.parse_args()
    for link in args.links:
        core.HostFabric(1, link=link).close()  # says what is wrong with it
    figures = results_file.continued(args.out)
    for key in args.models:
        model = KNOWN[key]
        new: dict[str, Any] = {"steps": args.steps, "dtype": args.dtype, "rows": {}}
        entry = figures.get(key, new)
        if any(entry[k] != new[k] for k in ("steps", "dtype")):
            entry = new
        figures[key] = entry
        entry["title"] = model.title
        for name in ("left_out", "failed"):
            entry.pop(name, None)
        print(f"== {model.title}: {args.steps} steps, {args.rounds} rounds", flush=True)
        run_model(model, args, entry, lambda: results_file.write(args.out, figures))
        results_file.write(args.out, figures)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
