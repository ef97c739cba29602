"""Store the bundles that published denoisers exchange at N=2, for ``asyncdiff bench exchange``.

python benchmarks/exchange/bundles.py   # writes python/asyncdiff/bench/bundles.json

The cuts are kept, so that figures of different versions are of the same bundles. The denoisers are
captured on the meta device: a few seconds, no weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import results_file
from asyncdiff.calls import parse
from asyncdiff.capture import capture, tensors_of
from asyncdiff.partition import partition
from denoise.models import MODELS

OUT = results_file.ROOT / "python" / "asyncdiff" / "bench" / "bundles.json"
CUTS = results_file.ROOT / "benchmarks" / "results" / "denoise_1gpu.json"


def bundle(key: str, cuts: list[str]) -> list[dict[str, Any]]:
    """The tensors that component 0 sends to component 1: dtype, shape, strides."""
    model = MODELS[key]
    module = model.build("meta", torch.float16)
    captured = capture(module, parse(module, (), model.inputs(module)))
    boundary = partition(captured, 2, cuts).boundaries[0, 1]
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
    figures = json.loads(CUTS.read_text())["figures"]
    bundles = {}
    for key, model in figures.items():
        bundles[f"{key}-N2"] = bundle(key, model["N=2 S=1 w=1"]["partition"]["cuts"])
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
