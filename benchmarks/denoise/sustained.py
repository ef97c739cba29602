"""What components take for a moment, for seconds, alone and all at once, beside what a tick takes.

    python benchmarks/denoise/sustained.py --model animatediff --schedule 4,1,1

A GPU under load may draw so much power that it slows down after a while, some more than others:
then a component takes less in a few runs than in a loop. This tells how much of a tick that is,
before anything is sought in the exchange. Milliseconds; CUDA graphs without exchange, replayed
behind each other; ``tick`` is what a further step of a loop takes, from loops of two lengths.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from denoise.loop import Loop
from denoise.models import MODELS
from denoise.settings import Setting
from denoise.timings import timed
from denoise.ways import Asynchronous, Graphed, Team
from markdown_table import markdown

#: Milliseconds of a moment, of a while, and of what is given to a GPU at a time.
MOMENT, WHILE, CHUNK = 100.0, 3000.0, 100.0
#: Seconds of rest before each.
REST = 1.0


def replayed(
    graphs: Sequence[tuple[Any, torch.cuda.CUDAGraph]], ms: Sequence[float], during: float
) -> list[float]:
    """Milliseconds of one replay of each graph in the last third of the time, all at once.

    ``graphs``: pairs of a worker, on whose stream it is replayed, and its graph; ``ms``: what each
    takes, about, by which each GPU is given as much to do as the others; ``during``: milliseconds.
    """
    time.sleep(REST)
    runs: list[list[tuple[int, Any, Any]]] = [[] for _ in graphs]
    done = [0] * len(graphs)
    for chunk in range(1, max(1, round(during / CHUNK)) + 1):
        for i, (worker, graph) in enumerate(graphs):
            count = max(1, round(chunk * CHUNK / ms[i]) - done[i])
            done[i] += count
            with worker.current():
                begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                graph.replay()  # until then a GPU that had nothing to do waits for the launch
                begun.record()
                for _ in range(count):
                    graph.replay()
                ended.record()
            runs[i].append((count, begun, ended))
        for mine in runs:
            if len(mine) > 2:
                mine[-3][2].synchronize()  # two chunks ahead, so that no GPU waits for this
    out = []
    for mine in runs:
        last = mine[-max(1, len(mine) // 3) :]
        last[-1][2].synchronize()
        out.append(sum(a.elapsed_time(b) for _, a, b in last) / sum(n for n, _, _ in last))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="animatediff", choices=MODELS)
    parser.add_argument("--schedule", type=Setting.parse, default=Setting(4, 1, 1))
    parser.add_argument("--steps", type=int, nargs=2, default=[20, 50])
    args = parser.parse_args()
    model, setting = MODELS[args.model], args.schedule
    if setting.split or torch.cuda.device_count() < setting.ranks:
        raise SystemExit(f"needs {setting.ranks} GPUs, and a schedule without guidance split")
    module = model.build("cuda:0", torch.float16)
    inputs = model.inputs(module)
    devices = [f"cuda:{r}" for r in range(setting.ranks)]
    one = Graphed(module, inputs)
    # A module of its own: a denoiser moves its weights, which the graph reads where they lie.
    team = Team(copy.deepcopy(module).to("cpu"), inputs, setting, devices, False)
    way = Asynchronous(team, setting)
    loops = [Loop(inputs, steps) for steps in args.steps]
    per_step = {}
    for name, what in (("one GPU", one), ("tick", way)):
        what.run(loops[0])
        few, many = (min(timed(what, loop)[0] for _ in range(2)) for loop in loops)
        per_step[name] = (many - few) / (args.steps[1] - args.steps[0])
    engine = team.denoiser._engine
    graphs = [(worker, engine.graph_alone(worker)) for worker in engine.workers]
    print(f"{model.title}, {setting.name}: {team.denoiser.partition.cuts}", flush=True)
    once = [c.ms for c in team.denoiser.partition.report().components]
    ms = [once[worker.index] for worker in engine.workers]
    pairs = list(zip(graphs, ms, strict=True))
    columns = {
        "alone, a moment": lambda: [replayed([g], [t], MOMENT)[0] for g, t in pairs],
        "alone, a while": lambda: [replayed([g], [t], WHILE)[0] for g, t in pairs],
        "at once, a moment": lambda: replayed(graphs, ms, MOMENT),
        "at once, a while": lambda: replayed(graphs, ms, WHILE),
    }
    rows = [["", *(f"rank {rank}" for rank in range(setting.ranks))]]
    for name, column in columns.items():
        rows.append([name, *(f"{t:.2f}" for t in column())])
        print(" | ".join(rows[-1]), flush=True)
    print(markdown(rows))
    ticks = per_step["tick"] * setting.stride
    print(f"a tick takes {ticks:.2f} ms, a step on one GPU {per_step['one GPU']:.2f}")
    team.denoiser.close()


if __name__ == "__main__":
    main()
