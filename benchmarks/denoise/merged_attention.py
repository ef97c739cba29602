"""Measure attention in two parts, merged by their log-sum-exp, beside attention over all keys.

    python benchmarks/denoise/merged_attention.py                    # on a GPU
    python benchmarks/denoise/merged_attention.py --device cpu       # a try, with few tokens

A rank that shares out tokens could attend to its own keys while the others' are on their way, then
to theirs, and merge both results: nothing of the exchange would be exposed. This is what that costs
at the sizes of published transformers, for half of the queries: milliseconds of cuDNN's attention
over all keys, of two such over half of them each, and of the merge (compiled by inductor), each in
a CUDA graph, medians; and how far the merged result is from that in float64.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn.functional import scaled_dot_product_attention

import results_file

#: By model: batch, heads, tokens, width of a head.
SIZES = {
    "flux": (1, 24, 4608, 128),
    "sd3": (1, 24, 4429, 64),
    "wan": (1, 12, 32760, 128),
}
Part = tuple[torch.Tensor, torch.Tensor]


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Part:
    """Attention, and the logarithm of the sum by which it is divided."""
    if query.is_cuda:
        out = torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)
        lse = out[1]
        return out[0], lse if lse.dim() == 4 else lse.unsqueeze(-1)
    result, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    return result, lse.unsqueeze(-1)


def merge(first: Part, second: Part) -> torch.Tensor:
    """Attention over both parts' keys."""
    (a, of_a), (b, of_b) = first, second
    share = torch.sigmoid(of_a - of_b)
    return (a * share + b * (1 - share)).to(a.dtype)


def graph_ms(work: Callable[[], Any], device: torch.device, replays: int = 40) -> float:
    """Milliseconds of one run in a CUDA graph (median); on the CPU as it is."""
    if device.type == "cpu":
        begun = time.perf_counter()
        work()
        return (time.perf_counter() - begun) * 1e3
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(4):
            work()
    times = []
    for _ in range(replays):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        times.append(begun.elapsed_time(ended) / 4)
    return statistics.median(times)


@torch.no_grad()
def measure(size: tuple[int, int, int, int], device: torch.device) -> dict[str, float]:
    """The figures of one model's attention."""
    batch, heads, tokens, width = size
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    made = torch.Generator(device).manual_seed(0)

    def drawn(count: int) -> torch.Tensor:
        shape = (batch, heads, count, width)
        return torch.randn(shape, device=device, dtype=dtype, generator=made)

    query, key, value = drawn(tokens // 2), drawn(tokens), drawn(tokens)
    chunks = zip(key.chunk(2, 2), value.chunk(2, 2), strict=True)
    halves = [(k.contiguous(), v.contiguous()) for k, v in chunks]
    merged = torch.compile(merge) if device.type == "cuda" else merge
    parts = [attend(query, *half) for half in halves]
    some = (slice(None), slice(0, 1), slice(0, 256))  # of all, float64 has no room
    exact = scaled_dot_product_attention(
        query[some].double(), key[:, :1].double(), value[:, :1].double()
    )
    whole = attend(query, key, value)[0]

    def distance(x: torch.Tensor) -> float:
        return float((x[some].double() - exact).norm() / exact.norm())

    return {
        "whole_ms": round(graph_ms(lambda: attend(query, key, value), device), 4),
        "halves_ms": round(graph_ms(lambda: [attend(query, *h) for h in halves], device), 4),
        "merge_ms": round(graph_ms(lambda: merged(*parts), device), 4),
        "whole_distance": distance(whole),
        "merged_distance": distance(merged(*parts)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a try-out")
    out = results_file.ROOT / "out" / "merged_attention.json"
    parser.add_argument("--out", type=Path, default=out)
    args = parser.parse_args()
    device = torch.device(args.device)
    figures = {}
    for name in args.models:
        size = SIZES[name] if device.type == "cuda" else (1, 2, 64, 32)
        figures[name] = measure(size, device)
        print(f"{name} {size}: {figures[name]}", flush=True)
        results_file.write(args.out, figures)


if __name__ == "__main__":
    main()
