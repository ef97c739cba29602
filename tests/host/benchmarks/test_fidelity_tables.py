"""Tables and figure of the fidelity benchmark, from made-up results: any of the models may lack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import figures
import pytest

import tables
from asyncdiff.runtime.exchange.compression.sent import Sent
from asyncdiff.schedule.plan import build
from fidelity import compression, compression_table, table
from fidelity.rows import Run, by_run, documents, read, together


def row(method: str, psnr: float, guidance: float = 2.0, **more: Any) -> dict[str, Any]:
    return {
        "sampler": "ddim", "steps": 50, "guidance": guidance, "method": method, "devices": 2,
        "settings": {}, "speedup": 1.8, "psnr_db": psnr, "psnr_db_p10": psnr - 3, "ssim": 0.98765,
    } | more  # fmt: skip


PICKED = {
    "components": 2, "schedule": "wavefront", "warmup": 15, "guidance": "batched",
    "exact_mode": "split", "measured_speedup": {"sdxl": 1.87, "flux": 1.71},
}  # fmt: skip
EXACT = {"components": 1, "guidance": "split", "measured_speedup": {"sdxl": 1.65}}
ROWS = [
    row("fewer steps, 25", 35.0, speedup=2.0, devices=1),
    row("wavefront N=2 S=1 w=1", 31.0),
    row("wavefront N=2 S=1 w=3", 33.0),
    row("quality balanced, 2 devices", 38.4, settings=PICKED),
    row("quality high, 2 devices", 120.0, settings=EXACT),
    row("asyncdiff N=3 S=1 w=1", 20.0, devices=3),
    row("wavefront N=3 S=1 w=1", 24.0, devices=3),
    row("wavefront, delay 1 N=3 S=1 w=1", 23.0, devices=3),
    row("wavefront N=2 S=1 w=1", 28.0, guidance=1.0),
    row("asyncdiff N=2 S=1 w=1", 18.0, steps=8, sampler="euler"),
    row("quality balanced, 2 devices", 120.0, steps=8, sampler="euler", settings=EXACT),
]


def write(folder: Path, model: str, rows: list[dict[str, Any]], **settings: Any) -> None:
    environment = {"gpus": [], "torch": "2.13", "commit": "abc", "command": "run.py"}
    figures = {"settings": {"prompts": ["cat"] * 60} | settings, "rows": rows}
    path = folder / f"fidelity_{model}.json"
    path.write_text(json.dumps({"environment": environment, "figures": figures}))


def test_without_results_the_pages_say_so(tmp_path: Path) -> None:
    for made in (table.kept, table.qualities, table.few_steps, table.delays):
        assert made(tmp_path) == "Not measured yet.\n"
    write(tmp_path, "emoji", [row("wavefront N=2 S=1 w=1", 30.0)])
    assert table.qualities(tmp_path) == table.few_steps(tmp_path) == "Not measured yet.\n"
    assert "30.0" in table.kept(tmp_path)


def test_tables_of_several_models(tmp_path: Path) -> None:
    write(tmp_path, "unet", ROWS)
    write(tmp_path, "emoji", ROWS[:2])
    kept = table.kept(tmp_path)
    assert kept.index("The UNet of varied") < kept.index("The shipped model")
    assert "DDIM, 50 steps, guidance 2:" in kept and "DDIM, 50 steps, without guidance:" in kept
    # The quality is first, a row that fewer steps beat is marked, few steps are not here.
    assert kept.index("quality balanced") < kept.index("wavefront N=2")
    assert "| wavefront N=2 S=1 w=1 | 2 | 1.80 | 31.0 † | 28.0 | 0.9877 |" in kept
    assert "w=3" not in kept and "Euler" not in kept
    qualities = table.qualities(tmp_path)
    assert (
        "| DDIM, 50 steps, guidance 2 | 2 | waves N=2, 15 of 50 steps exact, those split | "
        "1.87, –, 1.71 |  | 38.4 (35.4) at 1.80 | exact at 1.80 |"
    ) in qualities
    assert "8 steps" not in qualities
    few = table.few_steps(tmp_path)
    assert "| Euler, 8 steps, guidance 2 | 18.0 (15.0) |  |  |  |  | exact |" in few
    assert "50 steps" not in few and "shipped" not in few
    assert "| DDIM, 50 steps, guidance 2 | 3 | 1 | 20.0 † (17.0) |" in table.delays(tmp_path)


def test_earlier_results_have_one_guidance_for_all(tmp_path: Path) -> None:
    old = row("wavefront N=2 S=1 w=1", 30.0)
    del old["guidance"], old["psnr_db_p10"]
    write(tmp_path, "emoji", [old], guidance=5.0)
    document = read(tmp_path / "fidelity_emoji.json")
    assert "guidance" not in document["figures"]["settings"]
    assert list(by_run(document["figures"]["rows"])) == [Run("ddim", 50, 5.0)]
    assert "| 30.0 |  | 0.9877 |" in table.kept(tmp_path)


def test_the_figure_has_a_panel_for_each_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    write(tmp_path, "unet", ROWS)
    one = figures.digest()
    _, lines = figures.curves()["unet"]
    assert sum(map(len, lines)) == 6  # of others than w=1 there are no points
    write(tmp_path, "transformer", [row("asyncdiff N=2 S=1 w=1", 25.0, sampler="flow", steps=28)])
    assert figures.digest() != one
    run, lines = figures.curves()["transformer"]
    assert run == Run("flow", 28, 2.0) and [(1.8, 25.0)] in lines
    figures.speed_and_quality(tmp_path / "x.png")
    from PIL import Image

    assert Image.open(tmp_path / "x.png").info["Description"] == figures.digest()


def test_links_of_a_page_that_lies_deeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "unet", ROWS)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "](../../benchmarks/results/fidelity_unet.json)" in tables.qualities()
    assert "](../benchmarks/results/fidelity_unet.json)" in tables.fidelity()
    assert [model for model, *_ in documents(tmp_path)] == ["unet"]


def test_runs_beside_each_other_become_one_document(tmp_path: Path) -> None:
    for name, rows in (("few", ROWS[-2:]), ("many", ROWS[:3])):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "unet", rows)
    parts = [read(tmp_path / name / "fidelity_unet.json") for name in ("few", "many")]
    rows = together(parts)["figures"]["rows"]
    assert [r["steps"] for r in rows] == [50, 50, 50, 8, 8]
    assert list(by_run(rows)) == [Run("ddim", 50, 2.0), Run("euler", 8, 2.0)]
    parts[1]["environment"]["torch"] = "2.14"
    with pytest.raises(ValueError, match="different environment"):
        together(parts)


def test_what_compressing_costs(tmp_path: Path) -> None:
    assert compression_table.table(tmp_path) == "Not measured yet.\n"
    run = {"model": "unet", "sampler": "euler", "steps": 30, "guidance": 2.0}
    psnr = {"as it is": 60.0, "fp8": 59.75, "int8": 60.01, "fp8, of the value": 50.0}
    rows = [{**run, "way": way, "psnr_db": db} for way, db in psnr.items()]
    environment = {"torch": "2", "commit": "abc", "command": "compression.py"}
    document = {
        "environment": environment,
        "figures": {"settings": {"pictures": 4}, "rows": rows},
    }
    (tmp_path / "fidelity_compression.json").write_text(json.dumps(document))
    told = compression_table.table(tmp_path)
    assert "4 pictures a row" in told
    first = "| UNet: Euler, 30 steps, guidance 2 | 60.00 |"
    assert f"{first} 59.75 (-0.25) | 60.01 (+0.01) |" in told
    assert f"{first} 50.00 (-10.00) |" in told


def test_compressed_bundles_may_be_of_exact_steps_too() -> None:
    """For the benchmark alone: all but a generation's first one."""
    plan = build(2, 1, 3, 6)
    way = next(w for w in compression.OTHERS if w.exact)
    with way.applied():
        sent = Sent(plan.slots)
        for tick in plan.ticks:
            sent.add(tick)
    assert [sent.route(0, n).whole for n in range(5)] == [True, False, False, False, False]
