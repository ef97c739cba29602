"""The published denoisers at full size, on the meta device: structure without weights."""

from __future__ import annotations

import pytest
import torch

from asyncdiff.graph.capture import capture
from asyncdiff.graph.row import ROW_BYTES
from asyncdiff.graph.signature import parse
from asyncdiff.partition.cost import estimate
from asyncdiff.partition.partition import partition
from denoise.models import MODELS
from denoise.rows import rows_of

#: Billions of parameters, as published.
SIZES = {
    "sd15": 0.860,
    "sd21": 0.866,
    "sdxl": 2.567,
    "svd": 1.525,
    "animatediff": 1.28,
    "sd3": 2.03,
    "flux": 11.90,
    "wan": 1.419,
    "qwen": 20.43,
    "qwen-half": 10.24,
}
#: Whole on one rank: nodes that no run computes because of rows, and values and KiB of a row.
ROWS = {
    "sd15": (66, 22, 79),
    "sd21": (66, 22, 79),
    "sdxl": (57, 17, 54),
    "svd": (134, 44, 3938),
    "animatediff": (67, 22, 1260),
    "sd3": (410, 145, 4284),
    "flux": (522, 192, 2754),
    "wan": (209, 92, 1449),
    "qwen": (964, 361, 5232),
    "qwen-half": (502, 181, 2892),
}


@pytest.mark.slow
@pytest.mark.parametrize("key", MODELS)
def test_captures_and_splits(key: str) -> None:
    model = MODELS[key]
    module = model.build("meta", torch.float16)
    assert sum(p.numel() for p in module.parameters()) / 1e9 == pytest.approx(SIZES[key], rel=0.005)
    call = parse(module, (), model.inputs(module))
    captured = capture(module, call)
    costs = estimate(captured)
    total = sum(costs.ms.values())
    for count in (2, 4):
        parts = partition(captured, count, costs=costs)
        report = parts.report()
        assert len(report.components) == count
        assert parts.exact_order == tuple(range(count))
        # Balanced: the slowest component is close to an equal share, what is repeated included.
        assert max(c.ms for c in report.components) < 1.15 * total / count
        owned = [n for c in parts.components for n in c.owned]
        assert len(owned) == len(set(owned))
        for boundary in parts.boundaries.values():
            assert all(captured.ownable(v) for v in boundary.values)
    rows = rows_of(captured, 1)
    assert (rows.taken, *rows.values, round(rows.nbytes[0] / 1024)) == ROWS[key]
    assert rows.nbytes[0] <= ROW_BYTES
