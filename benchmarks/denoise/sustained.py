"""What components take for a moment, for seconds, alone and all at once, beside what a tick takes.

    python benchmarks/denoise/sustained.py --model animatediff --schedule 4,1,1

A GPU under load may slow down after a while, some more than others: then a component takes less in
a few runs than in a loop. This tells how much of a tick that is, before anything is sought in the
exchange. Milliseconds; CUDA graphs without exchange, replayed behind each other; a tick is what a
further step of a loop takes, from loops of two lengths. It has not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asyncdiff.runtime.cutting.rebalance import replay
from denoise.models import MODELS
from denoise.settings import Setting
from denoise.timings import timed
from denoise.ways import Asynchronous, Graphed, Team
from markdown_table import markdown

#: Milliseconds of a moment and of a while, and seconds of rest before each.
MOMENT, WHILE = 100.0, 3000.0
REST = 1.0


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
    one = Graphed(module)
    # A module of its own: a denoiser moves its weights, which the graph reads where they lie.
    loops = [model.loop(inputs, steps) for steps in args.steps]
    team = Team(copy.deepcopy(module).to("cpu"), loops[0], setting, devices, False)
    way = Asynchronous(team, setting)
    per_step = {}
    for name, what in (("one GPU", one), ("tick", way)):
        what.run(loops[0])
        few, many = (min(timed(what, loop)[0] for _ in range(2)) for loop in loops)
        per_step[name] = (many - few) / (args.steps[1] - args.steps[0])
    engine = team.denoiser._engine
    graphs = [engine.graph_alone(worker) for worker in engine.workers]
    print(f"{model.title}, {setting.name}: {team.denoiser.partition.cuts}", flush=True)
    once = replay(engine, engine.workers, graphs, [2] * setting.ranks)

    def for_ms(ms: float, ranks: Sequence[int]) -> list[float]:
        time.sleep(REST)
        workers, mine = ([of[r] for r in ranks] for of in (engine.workers, graphs))
        return replay(engine, workers, mine, [max(1, round(ms / once[r])) for r in ranks])

    ranks = range(setting.ranks)
    columns = {
        "alone, a moment": lambda: [for_ms(MOMENT, [r])[0] for r in ranks],
        "alone, a while": lambda: [for_ms(WHILE, [r])[0] for r in ranks],
        "at once, a moment": lambda: for_ms(MOMENT, ranks),
        "at once, a while": lambda: for_ms(WHILE, ranks),
    }
    rows = [["", *(f"rank {rank}" for rank in ranks)]]
    for name, column in columns.items():
        rows.append([name, *(f"{t:.2f}" for t in column())])
        print(" | ".join(rows[-1]), flush=True)
    print(markdown(rows))
    ticks = per_step["tick"] * setting.stride
    print(f"a tick takes {ticks:.2f} ms, a step on one GPU {per_step['one GPU']:.2f}")
    team.denoiser.close()


if __name__ == "__main__":
    main()
