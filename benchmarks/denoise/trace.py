"""Where a tick's time goes: what each GPU does while a generation runs, from torch's profiler.

    python benchmarks/denoise/trace.py --model sd15 --schedule 2,1,1
    python benchmarks/denoise/trace.py --model sd15 --schedule 4,1,1 --trace trace.json.gz

At every moment a GPU computes, or else moves data (a put, a copy), or else waits for another GPU (a
get, a free slot), or else idles. Printed for the middle of a generation: the share of each, and the
longest pauses of computing between the same two kernels. ``--trace`` also keeps the profiler's own
file, for ui.perfetto.dev. Profiling makes launches slower: loops that hang on the CPU look worse.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from denoise.models import MODELS
from denoise.settings import Setting
from denoise.ways import Asynchronous, Team
from markdown_table import markdown

#: What a GPU does, the first of them that is under way counting.
KINDS = ("computes", "moves", "waits", "idles")
#: Of the generation, what is looked at: neither exact steps nor the last ticks.
MIDDLE = (0.4, 0.9)
#: Microseconds: kernels of a graph that follow each other are a little less apart.
SHORTEST = 3.0


@dataclass(frozen=True)
class Work:
    """A kernel or a copy on a GPU; microseconds."""

    begin: float
    end: float
    kind: str
    name: str


@dataclass(frozen=True)
class Pause:
    """A time without computing on a GPU: kernels before and after, microseconds, and by kind."""

    before: str
    after: str
    us: float
    kinds: dict[str, float]


def by_gpu(trace: dict[str, Any]) -> dict[int, list[Work]]:
    """The GPUs' work in a trace of torch's profiler (Chrome's trace event format), in order."""
    out: dict[int, list[Work]] = defaultdict(list)
    for event in trace["traceEvents"]:
        category = event.get("cat")
        if event.get("ph") != "X" or category not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        name = event["name"]
        if category != "kernel" or "asyncdiff" in name:
            waits = re.search(r"\b(get|get_inline|begin|release|commit|arrive)_kernel", name)
            kind = "waits" if waits else "moves"
        else:
            kind = "computes"
        begin = float(event["ts"])
        work = Work(begin, begin + float(event["dur"]), kind, name)
        args = event["args"]
        # Copies between GPUs name three: both ends, and whose engine it is.
        out[int(args["device"] if "device" in args else args["inDevice"])].append(work)
    return {gpu: sorted(work, key=lambda w: w.begin) for gpu, work in sorted(out.items())}


def shares(work: Sequence[Work], begin: float, end: float) -> dict[str, float]:
    """Of the time from ``begin`` to ``end``, the share of each kind; one in all."""
    marks: list[tuple[float, int, str]] = []
    for w in work:
        if w.end > begin and w.begin < end:
            marks += [(max(w.begin, begin), 1, w.kind), (min(w.end, end), -1, w.kind)]
    marks.sort()
    running = dict.fromkeys(KINDS, 0)
    out = dict.fromkeys(KINDS, 0.0)
    now = begin
    for at, change, kind in [*marks, (end, 0, "idles")]:
        doing = next((k for k in KINDS if running[k]), "idles")
        out[doing] += at - now
        running[kind] += change
        now = at
    return {k: v / (end - begin) for k, v in out.items()}


def pauses(work: Sequence[Work], begin: float, end: float) -> list[Pause]:
    """The times without computing, in order, but for the shortest."""
    out = []
    others = [w for w in work if w.kind != "computes"]
    last: Work | None = None
    for w in work:
        if w.kind != "computes" or w.end <= begin or w.begin >= end:
            continue
        if last is not None and w.begin - last.end > SHORTEST:
            us = w.begin - last.end
            kinds = shares(others, last.end, w.begin)
            out.append(Pause(last.name, w.name, us, {k: v * us for k, v in kinds.items()}))
        if last is None or w.end > last.end:
            last = w
    return out


def longest(found: Iterable[Pause], count: int) -> list[list[str]]:
    """Rows of a table: the pauses between the same kernels together, those that cost most first."""
    groups: dict[tuple[str, str], list[Pause]] = defaultdict(list)
    for pause in found:
        groups[pause.before, pause.after].append(pause)
    rows = sorted(groups.items(), key=lambda g: -sum(p.us for p in g[1]))[:count]
    return [
        [
            f"{sum(p.us for p in group):.0f}",
            str(len(group)),
            *(f"{sum(p.kinds[k] for p in group) / len(group):.1f}" for k in KINDS[1:]),
            _short(before),
            _short(after),
        ]
        for (before, after), group in rows
    ]


def _short(name: str) -> str:
    """A kernel's name without its namespaces and parameters, for a table."""
    return re.sub(r"^(void )?([\w]+::|\(anonymous namespace\)::)*", "", name)[:40].replace("|", "/")


def report(trace: dict[str, Any], count: int = 6) -> str:
    """Tables of a trace."""
    gpus = by_gpu(trace)
    if not gpus:
        raise ValueError("the trace has no work of a GPU")
    first = min(w.begin for work in gpus.values() for w in work)
    last = max(w.end for work in gpus.values() for w in work)
    begin, end = (first + share * (last - first) for share in MIDDLE)
    rows = [["GPU", *KINDS]]
    rows += [
        [str(gpu), *(f"{100 * v:.1f} %" for v in shares(work, begin, end).values())]
        for gpu, work in gpus.items()
    ]
    out = [f"{(end - begin) / 1e3:.1f} ms in the middle of {(last - first) / 1e3:.1f}"]
    out.append(markdown(rows))
    heads = ["µs in all", "times", *(f"{k}, µs each" for k in KINDS[1:]), "after", "before"]
    for gpu, work in gpus.items():
        out.append(f"GPU {gpu}, pauses of computing:")
        out.append(markdown([heads, *longest(pauses(work, begin, end), count)]))
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="sd15", choices=MODELS)
    parser.add_argument("--schedule", type=Setting.parse, default=Setting(2, 1, 1))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--trace", type=Path, help="keep the profiler's file here (.json.gz)")
    args = parser.parse_args()
    gpus = torch.cuda.device_count()
    if gpus == 0:
        raise SystemExit("no GPU: there is nothing to profile")
    model, setting = MODELS[args.model], args.schedule
    module = model.build("cuda:0", torch.float16)
    inputs = model.inputs(module)
    devices = [f"cuda:{r % gpus}" for r in range(setting.ranks)]
    loop = model.loop(inputs, args.steps)
    team = Team(module, loop, setting, devices, args.compiled)
    way = Asynchronous(team, setting)
    for _ in range(2):
        way.run(loop)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        way.run(loop)
        for gpu in range(gpus):
            torch.cuda.synchronize(gpu)
    with tempfile.TemporaryDirectory() as folder:
        path = args.trace or Path(folder) / "trace.json.gz"
        profiler.export_chrome_trace(str(path))
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            trace = json.load(file)
    print(f"{model.title}, {setting.name}, {args.steps} steps\n{report(trace)}")
    team.denoiser.close()


if __name__ == "__main__":
    main()
