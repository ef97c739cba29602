"""Measure what compiling components takes, whole and by regions, and how fast steps are then.

    python benchmarks/denoise/compile.py                        # on two GPUs, five denoisers
    python benchmarks/denoise/compile.py --models flux --ways regions
    python benchmarks/denoise/compile.py --device cpu --dtype float32 --models tiny-sdxl  # a try

Each way of a model is prepared in a process of its own, with nothing on the disk: inductor's cache
and asyncdiff's are empty folders; then, but for ``--cold``, once more in another process, with what
the first one left there. Each process draws ``--rounds`` loops of ``--steps`` steps. Reported are
the seconds of the first generation by phase (``asyncdiff.phases``; ``total_s`` with what belongs to
none), how many pieces there were and how many of them inductor was given, the milliseconds of a
step (median, smallest, largest), of the components alone in CUDA graphs, and how far the result of
a few exact steps is from the plain module's. With ``--new-size`` the first generation of another
size follows in the same process, of three quarters of the height.

With ``--beside`` all of them prepare beside each other, and then time one by one: for what steps
take, which is then compared of the same cuts, by estimate. Preparing takes longer than by itself.

What ``--out`` has already, from the same machine and versions, stays in it: it is written after
each process, and a run that was stopped can go on with what is missing (``--again``: all anew).
With ``--seconds`` it stops by itself. Caches stay in ``--caches``, if that is given: then another
run finds them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import results_file
from denoise.beside import Lock
from denoise.models import MODELS, TRIES

WAYS: dict[str, bool | str] = {"whole": "whole", "regions": "regions", "graphs": False}
CACHES = ("cold", "warm")
KNOWN = MODELS | TRIES
OUT = Path(os.environ.get("OUT", results_file.ROOT / "benchmarks" / "results"))
#: Steps of which all are exact, to see whether what was compiled is right.
EXACT = 3


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one way of one model, in this process."""
    import torch

    # What a user has imported before the first generation begins: parallelize() is a call of it.
    from asyncdiff import AsyncDenoiser  # noqa: F401
    from asyncdiff.phases import recording
    from denoise.settings import Setting
    from denoise.timings import Timings, synchronize
    from denoise.ways import Asynchronous, Eager, Team, component_times

    lock = Lock(args.lock)
    lock.prepare()
    model, way = KNOWN[args.models[0]], args.ways[0]
    gpus = torch.cuda.device_count() if args.device == "cuda" else 0
    home = "cuda:0" if gpus else "cpu"
    devices = [f"cuda:{r % gpus}" if gpus else "cpu" for r in range(args.components)]
    module = model.build(home, getattr(torch, args.dtype))
    inputs = model.inputs(module)
    if args.new_size:  # before the denoiser leaves the GPU, where its inputs are made
        other = replace(model, height=model.height * 3 // 4 // 64 * 64)
        lower = other.loop(other.inputs(module), args.steps)
    eager = Timings()
    eager.take(Eager(module), model.loop(inputs, EXACT))
    given = 0
    inductor = torch._inductor.compile

    def counted(*call: Any, **options: Any) -> Any:
        nonlocal given
        given += 1
        return inductor(*call, **options)

    torch._inductor.compile = counted
    pieces: dict[str, int] = {}
    setting = Setting(args.components, 1, 1)
    loop = model.loop(inputs, args.steps)
    synchronize()
    with recording() as spent:
        # Whatever else the GPUs do misleads whoever times components.
        settings = {"split": "estimate"} if args.beside else {}
        team = Team(module, loop, setting, devices, WAYS[way], told(pieces), **settings)
        asynchronous = Asynchronous(team, setting)
        asynchronous.run(loop)
        synchronize()
    lock.time()
    timings = Timings()
    for _ in range(args.rounds):
        timings.take(asynchronous, loop)
    report = team.denoiser.report()
    alone = component_times(team.denoiser) if gpus else []
    lock.free()
    if args.new_size:
        with recording() as afresh:
            asynchronous.run(lower)
            synchronize()
    figures = {
        **seconds(spent),
        "compiled": report.compiled,
        "pieces": sum(pieces.values()),
        "given_to_inductor": given,
        **timings.figures(args.steps),
        "devices": devices,
        "shared_gpus": gpus < args.components,
        "prepared_beside_others": args.beside,
        "commit": results_file.commit(),
    }
    if args.new_size:
        figures["new_size"] = {"height": other.height, "width": other.width, **seconds(afresh)}
    if gpus:
        figures["component_ms_alone"] = [round(t, 3) for t in alone]
        figures["cuts"] = team.denoiser.partition.cuts
    exact = Timings()
    few = model.loop(inputs, EXACT)
    exact.take(Asynchronous(team, Setting(args.components, 1, EXACT)), few)
    figures["distance_to_eager"] = exact.distance(eager)
    team.denoiser.close()
    return figures


def seconds(spent: Any) -> dict[str, Any]:
    """What a first generation took, by phase and in all."""
    phases = {name: round(s, 2) for name, s in spent.in_order().items()}
    return {"phases_s": phases, "total_s": round(spent.total, 2)}


def told(pieces: dict[str, int]) -> Any:
    """Notes of how many pieces each rank's component consists."""

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("compiling"):
            pieces[what] = total

    return progress


def run(
    args: argparse.Namespace, key: str, way: str, cache: str, folder: Path
) -> dict[str, Any] | None:
    """The figures of one way of one model, from a process of its own; None where time ran out."""
    if cache == "cold":
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_CACHE_DIR"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    environment["ASYNCDIFF_CACHE"] = str(folder / "asyncdiff")
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--one", str(result), "--models", key, "--ways", way]
    for name in ("components", "steps", "rounds", "dtype", "device"):
        command += [f"--{name}", str(getattr(args, name))]
    if args.new_size:
        command.append("--new-size")
    if args.beside:
        command += ["--beside", "--lock", str(folder.parent / "lock")]
    try:
        done = subprocess.run(command, env=environment, timeout=args.left())
    except subprocess.TimeoutExpired:
        # Half a cache would be neither cold nor warm.
        shutil.rmtree(folder, ignore_errors=True)
        return None
    if done.returncode != 0:
        return {"failed": f"exit code {done.returncode}"}
    figures: dict[str, Any] = json.loads(result.read_text())
    return figures


def compared(ways: dict[str, Any]) -> dict[str, float]:
    """Regions over whole components, where both were measured: milliseconds of a step, and of all
    components alone, seconds of the first generation and of compiling."""
    out: dict[str, float] = {}
    for cache in CACHES:
        both = [ways.get(way, {}).get(cache, {}) for way in ("regions", "whole")]
        if any("ms_a_step" not in each for each in both):
            continue
        regions, whole = both
        steps = regions["ms_a_step"]["median"] / whole["ms_a_step"]["median"]
        out[f"step_{cache}"] = round(steps, 4)
        out[f"total_{cache}"] = round(regions["total_s"] / whole["total_s"], 3)
        if all("component_ms_alone" in each for each in both):  # however evenly it was cut
            alone = [sum(each["component_ms_alone"]) for each in both]
            out[f"alone_{cache}"] = round(alone[0] / alone[1], 4)
        compile = [each["phases_s"].get("compile", 0.0) for each in both]
        out[f"compile_{cache}"] = round(compile[0] / compile[1], 3) if compile[1] else 0.0
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    standard = ["sd21", "sdxl", "svd", "sd3", "flux"]
    parser.add_argument("--models", nargs="+", default=standard, choices=KNOWN)
    parser.add_argument("--ways", nargs="+", default=["whole", "regions"], choices=WAYS)
    parser.add_argument(
        "--caches",
        type=Path,
        help="folder that the caches stay in (none: one that is removed in the end)",
    )
    parser.add_argument("--components", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a try-out")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--cold", action="store_true", help="no process with what another kept")
    parser.add_argument("--beside", action="store_true", help="all at once, cold: see above")
    parser.add_argument("--new-size", action="store_true", help="also that of another size")
    parser.add_argument("--again", action="store_true", help="measure what --out has already")
    parser.add_argument("--out", type=Path, default=OUT / "compile.json")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--lock", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        args.one.write_text(json.dumps(measure(args)))
        return
    started = time.monotonic()
    # None waits for ever; nothing is begun in the last seconds.
    finite = args.seconds != float("inf")
    args.left = lambda: max(started + args.seconds - time.monotonic(), 1) if finite else None
    folder = args.caches or Path(tempfile.mkdtemp(prefix="asyncdiff-compile-"))
    figures = results_file.continued(args.out)
    good = True
    try:
        if args.beside:
            good = measured_beside(args, figures, folder)
        else:
            for key in args.models:
                good &= measured(args, key, figures, folder)
    finally:
        if args.caches is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"written to {args.out}")
    raise SystemExit(not good)


def entry_of(args: argparse.Namespace, key: str, figures: dict[str, Any]) -> dict[str, Any]:
    """A model's figures in ``figures``: those that there are, if they were asked for so."""
    asked = {"steps": args.steps, "dtype": args.dtype, "components": args.components}
    entry: dict[str, Any] = figures.get(key, {})
    if args.again or any(entry.get(name) != value for name, value in asked.items()):
        entry = {"title": KNOWN[key].title, **asked, "ways": {}}
    figures[key] = entry
    return entry


def measured_beside(args: argparse.Namespace, figures: dict[str, Any], folder: Path) -> bool:
    """As :func:`measured`, of all models and ways at once, with nothing on the disk."""
    entries = {key: entry_of(args, key, figures) for key in args.models}
    wanted = [
        (key, way)
        for key in args.models
        for way in args.ways
        if "total_s" not in entries[key]["ways"].get(way, {}).get("cold", {})
    ]
    good = True
    with ThreadPoolExecutor(max(len(wanted), 1)) as pool:
        runs = {
            pool.submit(run, args, key, way, "cold", folder / f"{key}-{way}"): (key, way)
            for key, way in wanted
        }
        for done in as_completed(runs):
            key, way = runs[done]
            found = done.result()
            if found is None:
                print(f"{key}, {way}: no time was left", flush=True)
                good = False
                continue
            entries[key]["ways"].setdefault(way, {})["cold"] = found
            entries[key]["regions_over_whole"] = compared(entries[key]["ways"])
            results_file.write(args.out, figures)
            print(f"{key}, {way}: {json.dumps(found)}", flush=True)
            good &= "failed" not in found
    for key, entry in entries.items():
        print(f"{key}: regions over whole {entry.get('regions_over_whole')}", flush=True)
    return good


def measured(args: argparse.Namespace, key: str, figures: dict[str, Any], folder: Path) -> bool:
    """Put a model's figures into ``figures`` and ``--out``, process by process; whether none
    failed, or was left out for lack of time."""
    entry, good = entry_of(args, key, figures), True
    for way in args.ways:
        known, place = entry["ways"].setdefault(way, {}), folder / f"{key}-{way}"
        warm = args.cold or "total_s" in known.get("warm", {})
        if "total_s" in known.get("cold", {}) and not warm:
            # What the cold process left may be gone.
            known = entry["ways"][way] = known if place.exists() else {}
        for cache in CACHES[: 1 if args.cold else None]:
            if "total_s" in known.get(cache, {}):
                continue
            found = run(args, key, way, cache, place)
            if found is None:
                print(f"{key}, {way}, {cache}: no time was left", flush=True)
                return False
            known[cache] = found
            entry["regions_over_whole"] = compared(entry["ways"])
            results_file.write(args.out, figures)
            print(f"{key}, {way}, {cache}: {json.dumps(found)}", flush=True)
            if "failed" in found:
                good = False
                break
    print(f"{key}: regions over whole {entry['regions_over_whole']}", flush=True)
    return good


if __name__ == "__main__":
    main()
