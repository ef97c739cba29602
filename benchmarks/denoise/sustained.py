"""What components take for a moment, for seconds, alone and all at once, beside what a tick takes.

    python benchmarks/denoise/sustained.py --model animatediff --schedule 4,1,1

A GPU under load may draw so much power that it slows down after a while, some more than others:
then a component takes less in a few runs than in a loop. This tells how much of a tick that is,
before anything is sought in the exchange. Milliseconds; CUDA graphs without exchange, replayed
behind each other; ``tick`` is what a further step of a loop takes, from loops of two lengths.
"""

from __future__ import annotations

import argparse
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

#: Seconds of a moment, of a while, and of rest before each.
MOMENT, WHILE, REST = 0.1, 3.0, 1.0


def replayed(graphs: Sequence[tuple[Any, torch.cuda.CUDAGraph]], seconds: float) -> list[float]:
    """Milliseconds of one replay of each graph, in the last third of ``seconds``, all at once.

    ``graphs``: pairs of a worker, on whose stream it is replayed, and its graph.
    """
    time.sleep(REST)
    events: list[list[torch.cuda.Event]] = [[] for _ in graphs]
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds or len(events[0]) < 4:
        for (worker, graph), marks in zip(graphs, events, strict=True):
            with worker.current():
                graph.replay()
                marks.append(torch.cuda.Event(enable_timing=True))
                marks[-1].record()
        for marks in events:
            if len(marks) > 2:
                marks[-3].synchronize()  # two replays ahead, so that GPUs never wait for this
    out = []
    for marks in events:
        marks[-1].synchronize()
        count = max(1, len(marks) // 3)
        out.append(marks[-1 - count].elapsed_time(marks[-1]) / count)
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
    team = Team(module, inputs, setting, devices, False)
    way = Asynchronous(team, setting)
    loops = [Loop(inputs, steps) for steps in args.steps]
    per_step = {}
    for name, what in (("one GPU", one), ("tick", way)):
        what.run(loops[0])
        few, many = (min(timed(what, loop)[0] for _ in range(2)) for loop in loops)
        per_step[name] = (many - few) / (args.steps[1] - args.steps[0])
    engine = team.denoiser._engine
    graphs = [(worker, engine.graph_alone(worker)) for worker in engine.workers]
    columns = {
        "alone, a moment": [replayed([g], MOMENT)[0] for g in graphs],
        "alone, a while": [replayed([g], WHILE)[0] for g in graphs],
        "at once, a moment": replayed(graphs, MOMENT),
        "at once, a while": replayed(graphs, WHILE),
    }
    rows = [["rank", *columns]]
    rows += [
        [str(rank), *(f"{times[rank]:.2f}" for times in columns.values())]
        for rank in range(setting.ranks)
    ]
    print(f"{model.title}, {setting.name}: {team.denoiser.partition.cuts}\n{markdown(rows)}")
    ticks = per_step["tick"] * setting.stride
    print(f"a tick takes {ticks:.2f} ms, a step on one GPU {per_step['one GPU']:.2f}")
    team.denoiser.close()


if __name__ == "__main__":
    main()
