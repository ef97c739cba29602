"""Predict, without any GPU, what links.py measures on two: ticks over links, N=2.

    python benchmarks/denoise/links_predicted.py                 # SDXL, SD 2.1 and FLUX

The denoiser is exported without memory, its nodes' times are estimated from FLOPs and bytes and
scaled so that their sum is what one GPU takes for a step in a CUDA graph (denoise_4gpu.json), and
it is cut for each link as an engine is. Values leave in the order in which they are made, each as
soon as it is there, one after another over the link; a tick ends when the slower component has
ended, and when all has arrived. What compressing takes is what ``compress="auto"`` takes it to be.

Writes links_predicted.json, every row of it marked as predicted; docs/guide/links.md has its table
as long as nothing was measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import asyncdiff_core as core
import results_file
from asyncdiff.graph.capture import Captured, capture, nbytes_of
from asyncdiff.graph.signature import parse
from asyncdiff.partition.cost import Costs, estimate
from asyncdiff.partition.exposure import exposed_ms, packing_ms
from asyncdiff.partition.links import Link, Links
from asyncdiff.partition.partition import partition
from asyncdiff.runtime.exchange.compression.choice import PACKED_PER_MS
from asyncdiff.runtime.exchange.compression.codec import crossing
from denoise.links import LINKS, NONE, compare, name_of
from denoise.models import MODELS, TRIES

RESULTS = results_file.ROOT / "benchmarks" / "results"
OUT = Path(os.environ.get("OUT", RESULTS))
KNOWN = MODELS | TRIES
#: NVLink between H200s, as benchmarks/denoise/predicted.py takes it: the real link.
NVLINK = Link(3.89e8, 1.34e-3)
WAYS = (NONE, "fp8")


def link_of(text: str) -> Link:
    """A link in words, as ASYNCDIFF_LINK takes it; "off" is NVLink."""
    told = core.HostFabric(1, link=text).simulated_link
    if told is None:
        return NVLINK
    bandwidth, latency = told.split(",")[:2]
    return Link(float(bandwidth.removesuffix("GB/s")) * 1e6, float(latency[:-2]) * 1e-3)


def scaled(captured: Captured, step_ms: float) -> Costs:
    """Estimated costs, of which a run's come to ``step_ms``."""
    costs = estimate(captured)
    whole = sum(costs.ms[n] for n in captured.nodes if captured.each_run(n))
    return dataclasses.replace(costs, ms={n: ms * step_ms / whole for n, ms in costs.ms.items()})


def row(captured: Captured, costs: Costs, link: Link, compress: str) -> dict[str, Any]:
    """A tick over a link, whose bundles are compressed so."""
    links = Links(Link(1e9), {(0, 1): link})
    nbytes = nbytes_of if compress == NONE else crossing
    parts = partition(captured, 2, costs=costs, links=links, nbytes=nbytes)
    first, second = (c.ms for c in parts.report().components)
    exposed = exposed_ms(parts, links, nbytes)[0]
    boundary = parts.boundaries[0, 1]
    # Values are packed beside the computation, and unpacked before the other one begins.
    pack = 0.0 if compress == NONE else packing_ms(boundary.nbytes, PACKED_PER_MS["cuda"])
    tick = round(max(second + pack, first + exposed), 3)
    return {
        "predicted": True,
        "tick_ms": {"median": tick, "min": tick, "max": tick},
        "exposed_ms": round(exposed, 3),
        "exposed_share": round(exposed / tick, 4),
        "exchange_mib": round(sum(map(nbytes, boundary.values)) / 2**20, 3),
        "component_ms": [round(first, 3), round(second, 3)],
        "cuts": list(parts.cuts or ()),
    }


def rows_of(captured: Captured, costs: Costs, ways: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The rows of all links."""
    rows: dict[str, dict[str, Any]] = {}
    for text, title in LINKS.items():
        for way in ways:
            found = row(captured, costs, link_of(text), way)
            rows[name_of(text, way)] = found | {"title": title, "compress": way}
            if text == "off":
                rows[name_of(text, way)]["title"] = "NVLink: 389 GB/s, 1 µs"
    compare(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["sdxl", "sd21", "flux"], choices=KNOWN)
    parser.add_argument("--step-ms", type=float, help="of one GPU, in place of the results'")
    parser.add_argument("--out", type=Path, default=OUT / "links_predicted.json")
    args = parser.parse_args()
    measured = json.loads((RESULTS / "denoise_4gpu.json").read_text())["figures"]
    figures: dict[str, Any] = {}
    for key in args.models:
        model = KNOWN[key]
        step_ms = args.step_ms or measured[key]["graph"]["ms_a_step"]["median"]
        module = model.build("meta", torch.float16)
        call = parse(module, (), model.inputs(module))
        captured = capture(module, call)
        rows = rows_of(captured, scaled(captured, step_ms), WAYS)
        figures[key] = {"title": model.title, "step_ms": step_ms, "rows": rows}
        for name, found in rows.items():
            print(f"{model.title}, {name}: {found['tick_ms']['median']} ms, {found}"[:200])
        results_file.write(args.out, figures)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
