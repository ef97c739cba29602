"""Time whole denoising loops of published denoisers, three ways side by side.

    python benchmarks/denoise/run.py                    # SD 2.1 and SDXL, N=2 on two GPUs
    python benchmarks/denoise/run.py --models flux --schedules 2,1,1 2,2,1 --rounds 3
    python benchmarks/denoise/run.py --modes graph      # without what is compiled
    python benchmarks/denoise/run.py --schedules 2,1,1 2,1,9,splitwarm 1,1,1,split
    python benchmarks/denoise/run.py --models flux-float8-dynamic --dtype bfloat16  # torchao
    python benchmarks/denoise/run.py --device cpu --models tiny --dtype float32  # a try-out

Random weights at the published sizes, fp16, guidance on (a batch of two, or with Wan and Qwen-Image
two calls a step; FLUX has none), DDIM.
Each round runs, on one GPU, (a) eager, (b) the whole denoiser in a CUDA graph, (c) the same
compiled by torch.compile; and (d) asyncdiff with each schedule, with and without compiled
components; one after another. A ratio is taken within a round, against the single GPU in the same
mode and against eager. Reported: medians, with the smallest and the largest. ``efficiency_alone``
is the single GPU's time over N times the slowest component's, each alone in a CUDA graph: what the
partition allows, before any exchange.

With fewer GPUs than ranks the ranks share them: the exchange is then tested, and the components'
own times are still measured, but no speedup is reported. ``--predict 2 3 4`` then times the
components of such partitions alone and reports what their plans would take on enough GPUs.

What ``--out`` has already, from the same machine and versions, stays in it unless it is measured
again: a run can be continued with other models, modes and schedules of as many steps. It is written
anew after everything that was prepared or timed, so that a run which is stopped keeps what it has
(to be shown in the README, the JSON goes to benchmarks/results/denoise_*.json);
with ``--seconds`` it stops by itself, and says what it left out. Preparing takes far longer than
timing, and mostly a core of the CPU: with ``--lock FILE`` several runs on one machine, with an
``--out`` each, prepare beside each other, and each times alone. ``merge.py`` beside this puts their
results together.

``steady``: from loops of two lengths, what a further step takes, and the single GPU's over it and
over what the ranks could do at best (``efficiency``).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import itertools
import logging
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import results_file
from denoise.beside import Lock
from denoise.exports import Exports
from denoise.loop import Loop
from denoise.memory import Memory
from denoise.models import MODELS, QUANTISED, TRIES, Published
from denoise.predicted import Alone, predicted
from denoise.settings import OPTIONS, Setting
from denoise.timings import Timings, steady, synchronize, timed
from denoise.ways import Asynchronous, Eager, Graphed, Team, component_times
from plan_macs import macs_by_rank

#: How (b), (c) and (d) run, and what is added to the names of schedules.
SUFFIX = {"graph": "", "compiled": ", compiled"}
OUT = Path(os.environ.get("OUT", results_file.ROOT / "benchmarks" / "results"))
STARTED = time.monotonic()
KNOWN = MODELS | QUANTISED | TRIES


def run_model(
    model: Published,
    args: argparse.Namespace,
    save: Callable[[dict[str, Any]], None],
    lock: Lock,
    exports: Exports,
) -> None:
    """All figures of one model, given to ``save`` again and again, as far as they are known.

    Memory is that of a team after a setting's first generation: those of one team follow each
    other, and what a setting adds is there from then on.
    """
    gpus = torch.cuda.device_count() if args.device == "cuda" else 0
    home = "cuda:0" if gpus else "cpu"
    dtype = getattr(torch, args.dtype)
    modes = list(args.modes) if gpus else []
    figures: dict[str, Any] = {"title": model.title, "steps": args.steps[0], "rounds": 0}
    figures["dtype"] = args.dtype
    print(f"== {model.title}: {args.steps} steps, {args.rounds} rounds", flush=True)
    lock.prepare()
    ways: dict[str, Any] = {}
    bases: dict[str, str] = {}  # of each asynchronous way: one GPU in the same mode
    memory: dict[str, Any] = {}
    teams: dict[Any, Team] = {}

    def late(what: str) -> bool:
        if time.monotonic() - STARTED < args.seconds:
            return False
        print(f"   no time left for {what}", flush=True)
        figures.setdefault("left_out", []).append(what)
        return True

    # One GPU first: without it nothing else says anything.
    before = Memory()
    with lock.quiet():
        module = model.build(home, dtype)
        inputs = model.inputs(module)
        ways["eager"] = Eager(module)
        ways["eager"].run(model.loop(inputs, 3))
        synchronize()
    memory["eager"] = before.taken()
    for mode in modes:
        begun = time.perf_counter()
        with lock.quiet() if mode == "graph" else contextlib.nullcontext():
            ways[mode] = Graphed(module, compile=mode == "compiled")
        with lock.quiet():
            ways[mode].run(model.loop(inputs, min(args.steps[0], args.warm_steps)))
            synchronize()
        figures[mode] = {"first_generation_s": round(time.perf_counter() - begun, 1)}
        print(f"   one GPU, {mode}: {figures[mode]}", flush=True)

    teamed = sorted(args.schedules, key=lambda s: [t.team for t in args.schedules].index(s.team))
    on_host: dict[str, torch.nn.Module] = {}  # compiled components change how weights lie
    for mode, setting in itertools.product(modes or ["eager"], teamed):
        name = setting.name + SUFFIX.get(mode, "")
        if late(name):
            continue
        devices = [f"cuda:{r % gpus}" if gpus else "cpu" for r in range(setting.ranks)]
        try:
            if (setting.team, mode) not in teams:
                if mode not in on_host:
                    on_host[mode] = copy.deepcopy(module).to("cpu")
                before, begun, spared = Memory(), time.perf_counter(), exports.spared
                loop = model.loop(inputs, 2)
                team = Team(on_host[mode], loop, setting, devices, mode == "compiled")
                teams[setting.team, mode] = team
                seconds = time.perf_counter() - begun + exports.spared - spared
                partition = team.denoiser.partition.report()
                print(f"   {name}: prepared in {seconds:.1f} s\n{partition}", flush=True)
            team = teams[setting.team, mode]
            way = Asynchronous(team, setting)
            begun = time.perf_counter()
            with lock.quiet():
                few = setting.enough(args.warm_steps)
                way.run(model.loop(inputs, min(args.steps[0], few)))
                synchronize()
        except Exception as e:  # what one setting cannot do costs the others nothing
            traceback.print_exc()
            figures.setdefault("failed", {})[name] = f"{type(e).__name__}: {e}"
            continue
        ways[name] = way
        bases[name] = mode
        memory[name] = before.taken()
        report = way.denoiser.report()
        plan = way.denoiser.plan(args.steps[0])
        parts = way.denoiser.partition.report()
        figures[name] = {
            "devices": devices,
            "shared_gpus": gpus < setting.ranks,
            "mode": mode,
            "prepare_s": round(seconds, 1),
            "first_generation_s": round(time.perf_counter() - begun, 1),
            "compile_s": round(report.compile_s, 1),
            "cuda_graphs": report.cuda_graphs,
            "compiled": report.compiled,
            "exchange_mib_per_tick": round(report.exchange_bytes_per_tick / 2**20, 2),
            "gmacs_per_step_by_rank": [
                round(m / 1e9 / plan.steps, 2) for m in macs_by_rank(plan, parts)
            ],
            "partition": parts.to_dict(),
            "memory_mib": memory[name],
        }
        print(f"   {name}: first generation {figures[name]['first_generation_s']} s", flush=True)
        save(figures)
    lock.time()
    sound = {(ways[name].setting.team, mode) for name, mode in bases.items()} if gpus else set()
    alone = {key: component_times(teams[key].denoiser) for key in sound}
    order = ["eager", *modes, *bases]

    lengths: dict[int, dict[str, Timings]] = {}
    for steps in args.steps:
        loop = model.loop(inputs, steps)
        if steps != args.steps[0]:
            # Eager's loop takes longest, and its first length says enough.
            few = [n for n in bases if ways[n].setting.ranks <= args.further_ranks]
            order = [*(modes or ["eager"]), *few]
        lengths[steps] = timings = {name: Timings() for name in order}
        for number in range(args.rounds):
            if number > 0 and late(f"round {number + 1} of {steps} steps"):
                break
            for name in order:
                if name != "eager" or number < args.eager_rounds:
                    timings[name].take(ways[name], loop)
                entry = figures.setdefault(name, {})
                if steps != args.steps[0]:  # further lengths stand under their own key
                    entry = entry.setdefault(f"{steps} steps", {})
                entry |= {"commit": results_file.commit(), **timings[name].figures(steps)}
                shared = figures[name].get("shared_gpus", False)
                for base in dict.fromkeys(("eager", bases.get(name, "eager"))):
                    if name != base and base in timings and not shared:
                        entry[f"speedup_over_{base}"] = timings[name].ratios(timings[base])
                if "eager" in timings:
                    entry["distance_to_eager"] = timings[name].distance(timings["eager"])
                if name in bases and gpus and steps == args.steps[0]:
                    setting = ways[name].setting
                    times = alone[setting.team, bases[name]]
                    entry["component_ms_alone"] = [round(t, 3) for t in times]
                    best = figures[bases[name]]["ms_a_step"]["median"]
                    share = best / setting.components / (2 if setting.split else 1)
                    # A batch is halved where guidance is split; of two calls a rank has one.
                    calls = max(1, model.branches // (2 if setting.split else 1))
                    slowest = calls * max(times[: setting.components])
                    entry["efficiency_alone"] = round(share / slowest, 3)
                figures[name]["memory_mib"] = memory.get(name)
                save(figures)
            if steps == args.steps[0]:
                figures["rounds"] = number + 1
            save(figures)
    for name in bases:
        if not figures[name]["shared_gpus"]:
            figures[name] |= steady(lengths, name, bases[name], ways[name].setting)
    save(figures)
    lock.free()
    for name in ["eager", *modes, *bases]:
        entry = figures[name]
        print(f"   {name}: " + "  ".join(f"{k} {v}" for k, v in entry.items() if k != "partition"))
    sys.stdout.flush()
    for team in teams.values():
        team.denoiser.close()
    exports.forget()
    if args.predict:
        mode = "graph" if "graph" in figures else "eager"
        one_gpu = figures[mode]["ms_a_step"]["median"]
        each = {n: timed_alone(model, module, inputs, n, home) for n in args.predict}
        update_ms = statistics.median(timed(Update(), loop)[0] for _ in range(5)) / steps
        figures["predicted"] = {
            "from": f"components alone, mode {mode}; see benchmarks/denoise/predicted.py",
            "steps": args.predict_steps,
            "update_ms": round(update_ms, 4),
            "rows": predicted(each, args.predict_steps, update_ms, one_gpu),
        }
        for name, row in figures["predicted"]["rows"].items():
            print(f"   predicted {name}: {row}", flush=True)
        save(figures)


def timed_alone(
    model: Published, module: torch.nn.Module, inputs: dict[str, Any], components: int, home: str
) -> Alone:
    """The denoiser in so many components, not compiled, each of them timed alone."""
    loop = model.loop(inputs, 2)
    team = Team(module, loop, Setting(components, 1, 1), [home] * components, False)
    try:
        Asynchronous(team, Setting(components, 1, 1)).run(model.loop(inputs, 3))
        parts = team.denoiser.partition.report()
        on_gpu = home != "cpu"  # there the times are the partition's own
        times = component_times(team.denoiser) if on_gpu else [c.ms for c in parts.components]
        print(f"   {components} components alone: {[round(t, 3) for t in times]} ms\n{parts}")
        return Alone(parts, tuple(model.branches * t for t in times))  # of a step
    finally:
        team.denoiser.close()


class Update:
    """A loop without a denoiser: what its sampler takes."""

    def run(self, loop: Loop) -> torch.Tensor:
        return loop(lambda kwargs, _: loop.inputs[loop.name])


class Saving:
    """Writes a model's figures beside those that ``--out`` had."""

    def __init__(self, args: argparse.Namespace, figures: dict[str, Any], key: str) -> None:
        self._out = args.out
        self._all = figures
        self._key = key
        old = figures.get(key, {})
        fits = (old.get("steps"), old.get("dtype")) == (args.steps[0], args.dtype)
        self._old = (
            {k: v for k, v in old.items() if k not in ("left_out", "failed")} if fits else {}
        )
        commands = (self._old.get("command"), results_file.environment()["command"])
        self._command = "; ".join(dict.fromkeys(c for c in commands if c))

    def __call__(self, new: dict[str, Any]) -> None:
        """Write what is known now."""
        self._all[self._key] = {**self._old, **new, "command": self._command}
        keys = [k for k in KNOWN if k in self._all]
        results_file.write(self._out, {k: self._all[k] for k in keys})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["sd21", "sdxl"], choices=KNOWN)
    parser.add_argument(
        "--schedules",
        nargs="+",
        type=Setting.parse,
        default=[Setting(2, 1, 1)],
        metavar="N,S,w[,OPTION]",
        help="asynchronous settings; options: tail=J, delay=D (of waves), "
        + ", ".join(f"{k} ({why})" for k, (_, why) in OPTIONS.items()),
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[50])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--warm-steps",
        type=int,
        default=sys.maxsize,
        help="of the generation that each setting begins with, untimed, at least (all): where loops"
        " take long. What depends on the timesteps is then computed in the first round",
    )
    parser.add_argument("--eager-rounds", type=int, default=sys.maxsize, help="of the first steps")
    parser.add_argument(
        "--further-ranks",
        type=int,
        default=sys.maxsize,
        help="--steps but the first are for settings of at most so many ranks",
    )
    parser.add_argument("--predict", type=int, nargs="+", default=[], metavar="N")
    parser.add_argument("--predict-steps", type=int, default=50, help="of the plans predicted")
    parser.add_argument("--modes", nargs="+", default=list(SUFFIX), choices=list(SUFFIX))
    parser.add_argument(
        "--seconds",
        type=float,
        default=float("inf"),
        help="since the start, after which nothing more is prepared and no further round begun",
    )
    parser.add_argument("--lock", type=Path, help="of runs beside each other: see above")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a try-out")
    parser.add_argument("--out", type=Path, default=OUT / "denoise.json")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU: on a CPU its times would say nothing")
    logging.basicConfig(format="   %(name)s: %(message)s", stream=sys.stdout)
    logging.getLogger("asyncdiff").setLevel(logging.INFO)  # how components come out
    figures = results_file.continued(args.out)
    failed = False
    lock = Lock(args.lock)
    exports = Exports(lock)
    for key in args.models:
        save = Saving(args, figures, key)
        try:
            run_model(KNOWN[key], args, save, lock, exports)
        except Exception:  # the other models may do better
            traceback.print_exc()
            failed = True
        failed = failed or "failed" in figures.get(key, {})
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    print(f"written to {args.out}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
