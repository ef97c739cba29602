"""What of the published denoisers depends on the timestep, but not on the latents.

Run: python benchmarks/denoise/rows.py [--models sd15 sdxl]. Needs no GPU and no memory for weights.
Writes rows.json, by model and number of components.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import fx

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import results_file
from asyncdiff.graph.capture import Captured, capture
from asyncdiff.graph.hoist import hoist
from asyncdiff.graph.program import NBYTES
from asyncdiff.graph.row import padded
from asyncdiff.graph.signature import parse
from asyncdiff.partition.partition import partition
from denoise.models import MODELS

OUT = results_file.ROOT / "benchmarks" / "results" / "rows.json"


@dataclass(frozen=True)
class Rows:
    """Nodes of all components' programs, those that no run computes any more because of rows, and
    values and bytes of a row by component."""

    nodes: int
    taken: int
    values: tuple[int, ...]
    nbytes: tuple[int, ...]


def rows_of(captured: Captured, components: int) -> Rows:
    """The rows of a denoiser in so many components."""
    parts = partition(captured, components, "auto" if components > 1 else ())
    nodes = taken = 0
    values, nbytes = [], []
    for component in parts.components:
        program = parts.program(component.index, torch.device("meta"))
        split = hoist(program)
        nodes += len(_computed(program))
        once = set() if split.once is None else _computed(split.once)
        taken += len(_computed(program) - once - _computed(split.main))
        row = [] if split.timed is None else _results(split.timed)
        values.append(len(row))
        nbytes.append(sum(padded(node.meta[NBYTES]) for node in row))
    return Rows(nodes, taken, tuple(values), tuple(nbytes))


def _computed(program: fx.GraphModule) -> set[str]:
    return {n.name for n in program.graph.nodes if n.op == "call_function"}


def _results(program: fx.GraphModule) -> list[fx.Node]:
    (output,) = program.graph.find_nodes(op="output")
    return list(output.all_input_nodes)


def main() -> None:
    """Write the figures, as far as they are known, after every model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    figures = {}
    for key in parser.parse_args().models:
        model = MODELS[key]
        module = model.build("meta", torch.float16)
        captured = capture(module, parse(module, (), model.inputs(module)))
        figures[key] = {"title": model.title}
        figures[key] |= {f"N={n}": asdict(rows_of(captured, n)) for n in (1, 2)}
        results_file.write(OUT, figures)
        print(figures[key], flush=True)


if __name__ == "__main__":
    main()
