"""Put the results of several runs on one machine into one file.

    python benchmarks/denoise/merge.py OUT IN [IN ...]

What an earlier file has of a model stays, but for figures that a later one has too: those of one
GPU (every run measures its own, to compare with) are the first file's, all others the last's. Every
ratio was taken within its own run. A later run may have been let see fewer of the machine's GPUs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from denoise.models import MODELS, QUANTISED, TRIES
from results_file import OF_THE_RUN

#: What may differ between the environments of runs on one machine; of GPUs see below.
ALLOWED = (*OF_THE_RUN, "gpus", "links")


def merge(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """One document. Raises ValueError if they are not of the same machine and versions."""
    first, *others = (d["environment"] for d in documents)
    for other in others:
        keys = dict.fromkeys((*first, *other))
        differ = [k for k in keys if k not in ALLOWED and first.get(k) != other.get(k)]
        if first["gpus"][: len(other["gpus"])] != other["gpus"]:
            differ.append("gpus")
        if differ:
            raise ValueError(f"not of the same machine and versions: {', '.join(differ)} differ")
    figures: dict[str, Any] = {}
    for document in documents:
        for key, model in document["figures"].items():
            figures[key] = _model(figures[key], model) if key in figures else model
    ordered = {k: figures[k] for k in MODELS | QUANTISED | TRIES if k in figures}
    return {"environment": documents[0]["environment"], "figures": ordered}


def _model(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    if (old["steps"], old["dtype"]) != (new["steps"], new["dtype"]):
        raise ValueError(f"{old['title']}: not of as many steps, or of another dtype")
    out = old | {k: v for k, v in new.items() if k not in old or k.startswith("N=")}
    out["rounds"] = min(old["rounds"], new["rounds"])
    out["command"] = "; ".join(dict.fromkeys([*old["command"].split("; "), new["command"]]))
    for key in ("failed", "left_out"):
        both = [m[key] for m in (old, new) if key in m]
        if len(both) == 2:
            out[key] = {**both[0], **both[1]} if key == "failed" else both[0] + both[1]
    return out


def main() -> None:
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    out, *paths = map(Path, sys.argv[1:])
    try:
        merged = merge([json.loads(path.read_text()) for path in paths])
    except ValueError as e:
        raise SystemExit(str(e)) from None
    out.write_text(json.dumps(merged, indent=1) + "\n")


if __name__ == "__main__":
    main()
