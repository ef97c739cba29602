"""What a denoiser's CUDA graph gains from kernels in the place of its memsets.

    python benchmarks/denoise/memsets.py [--models sd15 sd21] [--out FILE]

Each denoiser as one CUDA graph on one GPU, as torch captures it and as
asyncdiff.runtime.cuda_graphs changes it, in turn; medians of many replays.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import asyncdiff_core as core
import results_file
from denoise.models import MODELS
from denoise.timings import spread

ROUNDS = 15


def captured(module: torch.nn.Module, inputs: dict[str, Any]) -> torch.cuda.CUDAGraph:
    """The graph as torch captures it, not instantiated."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(2):
            module(**inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.no_grad(), torch.cuda.graph(graph, stream=stream):
        module(**inputs)
    return graph


def replay_ms(graph: torch.cuda.CUDAGraph, replays: int = 8) -> float:
    """Milliseconds of one of several replays behind each other."""
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    for _ in range(replays):
        graph.replay()
    ended.record()
    torch.cuda.synchronize()
    return begun.elapsed_time(ended) / replays


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["sd15", "sd21", "sdxl"])
    parser.add_argument("--out", type=Path, default=results_file.ROOT / "out" / "memsets.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU: on a CPU there are no CUDA graphs")
    figures = {}
    for key in args.models:
        module = MODELS[key].build("cuda:0", torch.float16)
        inputs = MODELS[key].inputs(module)
        plain, changed = captured(module, inputs), captured(module, inputs)
        memsets = core.replace_memsets(changed.raw_cuda_graph(), 0)
        for graph in (plain, changed):
            graph.instantiate()
            replay_ms(graph)
        ms = [(replay_ms(plain), replay_ms(changed)) for _ in range(ROUNDS)]
        figures[key] = {
            "memsets": memsets,
            "ms": spread([before for before, _ in ms]),
            "ms_replaced": spread([after for _, after in ms]),
            "ratio": spread([before / after for before, after in ms]),
        }
        print(MODELS[key].title, figures[key], flush=True)
        del plain, changed, module, inputs
        torch.cuda.empty_cache()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results_file.write(args.out, figures)


if __name__ == "__main__":
    main()
