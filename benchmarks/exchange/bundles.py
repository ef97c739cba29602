"""Store the bundles that published denoisers exchange at N=2, for ``asyncdiff bench exchange``.

python benchmarks/exchange/bundles.py   # writes benchmarks/exchange/asyncdiff_bench/bundles.json

The cuts are an early version's and stay, so that figures of different versions are of the same
bundles. The denoisers are captured on the meta device: a few seconds, no weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asyncdiff.graph.capture import capture, tensors_of
from asyncdiff.graph.signature import parse
from asyncdiff.partition.partition import partition
from denoise.models import MODELS

OUT = Path(__file__).parent / "asyncdiff_bench" / "bundles.json"
#: The node that component 1 begins with, by model.
CUTS = {"sd21": "silu_45", "sdxl": "mul_45"}


def bundle(key: str, cut: str) -> list[dict[str, Any]]:
    """The tensors that component 0 sends to component 1: dtype, shape, strides."""
    model = MODELS[key]
    module = model.build("meta", torch.float16)
    captured = capture(module, parse(module, (), model.inputs(module)))
    boundary = partition(captured, 2, [cut]).boundaries[0, 1]
    out = []
    for value in boundary.values:
        for tensor in tensors_of(value):
            dense = torch.empty_like(tensor)  # what crosses has dense strides, in the same order
            out.append(
                {
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "shape": list(tensor.shape),
                    "strides": list(dense.stride()),
                }
            )
    return out


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    bundles = {f"{key}-N2": bundle(key, cut) for key, cut in CUTS.items()}
    OUT.write_text(
        "{\n"
        + ",\n".join(
            f' "{name}": [\n  ' + ",\n  ".join(json.dumps(t) for t in tensors) + "\n ]"
            for name, tensors in bundles.items()
        )
        + "\n}\n"
    )


if __name__ == "__main__":
    main()
