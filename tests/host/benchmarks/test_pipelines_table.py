"""The run over diffusers' pipelines: its table, and the texts' stand-ins."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from pipelines import table  # noqa: E402
from pipelines.stand_ins import Tokenizer  # noqa: E402


def row(module: str, pipeline: str, **more: Any) -> dict[str, Any]:
    return {"module": f"tests.pipelines.{module}", "class": "T", "pipeline": pipeline} | more


def test_a_table_tells_what_came_of_each() -> None:
    served = {"exact": 0.0, "asynchronous": 0.25, "restored": 0.0, "branches": 2}
    rows = [
        row("wan.test_wan", "WanPipeline", **served),
        row("wan.test_wan_22", "WanPipeline", **served),
        row("a.test_a", "APipeline", **served | {"exact": 0.5, "branches": 1}),
        row(
            "b.test_b", "BPipeline", **{"exact refused": {"at": "run", "why": "E: no. More [f.py]"}}
        ),
        row("c.test_c", "CPipeline", **{"not built": "OSError"}),
        row("d.test_d", "DPipeline", failed="out of time"),
    ]
    environment = {"diffusers": "1", "torch": "2", "commit": "3"}
    text = table.table({"environment": environment, "figures": rows})
    assert "Of 5 pipelines" in text and "2 are exact, 2 are refused, 1 are wrong; 1 could" in text
    assert "| Wan (wan) | 2 | yes | 0.25 |" in text and "| Wan (wan_22) |" in text
    assert "| A | 1 | 5e-01 | 0.25 |" in text and "| B |  | refused: no |  |" in text


def test_tokens_of_a_text() -> None:
    said = Tokenizer()(["a lighthouse", "sea"], padding="max_length", max_length=8)
    assert [len(x) for x in said["input_ids"]] == [8, 8]
    longest = Tokenizer()("a lighthouse", return_tensors="pt")
    assert longest["input_ids"].shape == (1, 5) and longest["attention_mask"].dtype == torch.int64
