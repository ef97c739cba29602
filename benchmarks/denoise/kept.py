"""Measure what it takes to have a denoiser's graph: exported, with each layer traced and with those
that are alike traced once, read as torch.export keeps programs, and read as asyncdiff keeps graphs
(:mod:`asyncdiff.preparation`).

    python benchmarks/denoise/kept.py                      # the shipped model and SDXL, on the CPU

Denoisers are at their published sizes, those of diffusers on the meta device: nothing is computed.
Printed, and written to ``--out``: seconds of each way, the fastest of ``--rounds``, and bytes; the
word that a graph is kept under is made before it is read, and timed by itself.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import results_file
from asyncdiff.demo import model as demo_model
from asyncdiff.graph import capture as capturing
from asyncdiff.graph import export as exporting
from asyncdiff.graph.example_inputs import example_inputs
from asyncdiff.graph.signature import parse
from asyncdiff.graph.tracing.bodies import UnfollowedError
from asyncdiff.preparation.graph_text import of_data, to_data
from asyncdiff.preparation.key import of_graph
from denoise.models import MODELS

_SHIPPED = "shipped"


def denoiser(key: str) -> tuple[Any, dict[str, Any]]:
    """A denoiser and a call of it."""
    if key == _SHIPPED:
        module: Any = demo_model.load().unet
        return module, example_inputs(module)
    module = MODELS[key].build("meta", torch.float16)
    return module, MODELS[key].inputs(module)


def fastest(rounds: int, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the fastest of so many runs, and what the last one returned."""
    seconds, result = [], None
    for _ in range(rounds):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
    return round(min(seconds), 3), result


def measure(key: str, rounds: int) -> dict[str, Any]:
    """The figures of one denoiser."""
    module, inputs = denoiser(key)
    call = parse(module, (), inputs)
    programs: list[Any] = []
    export = capturing.export

    def kept(*args: Any) -> Any:
        programs.append(export(*args))
        return programs[-1]

    def all_traced(*args: Any) -> Any:
        raise UnfollowedError("all layers are to be traced")

    capturing.export = kept
    once_each = exporting._once_each
    try:
        exported_s, captured = fastest(rounds, lambda: capturing.capture(module, call))
        exporting._once_each = all_traced
        all_s, _ = fastest(rounds, lambda: capturing.capture(module, call))
    finally:
        capturing.export, exporting._once_each = export, once_each
    program = programs[-1][0]
    # Without weights: of other tensors than these torch would write the values, too.
    program._state_dict = {n: _empty(x) for n, x in program.state_dict.items()}
    saved = io.BytesIO()
    torch.export.save(program, saved)

    def of_torch() -> Any:
        saved.seek(0)
        return torch.export.load(saved)

    torch_s, _ = fastest(rounds, of_torch)
    packed = zlib.compress(json.dumps(to_data(captured), separators=(",", ":")).encode(), 1)
    word_s, _ = fastest(rounds, lambda: of_graph(module, call))
    read_s, _ = fastest(rounds, lambda: of_data(json.loads(zlib.decompress(packed)), module, call))
    return {
        "nodes": len(captured.nodes),
        "export_s": exported_s,
        "export_all_s": all_s,
        "torch_load_s": torch_s,
        "torch_bytes": len(saved.getvalue()),
        "word_s": word_s,
        "read_s": read_s,
        "bytes": len(packed),
    }


def _empty(x: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(x, device="meta")
    return torch.nn.Parameter(empty, False) if isinstance(x, torch.nn.Parameter) else empty


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [_SHIPPED, *sorted(MODELS)]
    parser.add_argument("--models", nargs="+", choices=names, default=[_SHIPPED, "sdxl"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=results_file.ROOT / "out" / "kept.json")
    args = parser.parse_args()
    figures = {}
    for key in args.models:
        figures[key] = measure(key, args.rounds)
        print(f"{key}: {json.dumps(figures[key])}", flush=True)
        results_file.write(args.out, figures)


if __name__ == "__main__":
    main()
