"""The benchmark of two GPUs of which one is slower: its logic, on CPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from asyncdiff.partition.runs import typical
from denoise.unequal import decisions, find_pause, of_ideal

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("wanted", [0.55, 0.6, 0.8])
def test_the_pause_that_leaves_the_wanted_share(wanted: float) -> None:
    tried = []

    def share_at(pause: float) -> float:
        """Of a process that works for 2 ms, in which it gets half of a GPU."""
        tried.append(pause)
        return 1 - 0.5 * 2 / (2 + pause)

    pause, share = find_pause(share_at, wanted)
    assert share == pytest.approx(wanted, abs=0.011) and share == share_at(pause)
    assert len(tried) <= 12
    # Where the other process cannot take so much: the closest.
    assert find_pause(share_at, 0.2)[1] == pytest.approx(0.5, abs=0.02)


def test_the_ideal_is_the_sum_of_the_speeds() -> None:
    assert of_ideal(16.0, [1.0, 0.6], 10.0) == pytest.approx(1.0)
    # Halves, of which the second takes 8 / 0.6 ms.
    assert of_ideal(16.0, [1.0, 0.6], 8 / 0.6) == pytest.approx(0.75)


def test_what_was_decided_of_components_is_recorded() -> None:
    with decisions() as decided:
        typical(lambda: [10.0, 16.0], [10.0, 10.0])
    (told,) = decided
    assert told.count("16.00") == 12 and "slower" in told
    typical(lambda: [10.0, 16.0], [10.0, 10.0])
    assert len(decided) == 1


@pytest.mark.slow
def test_it_runs_on_cpus(tmp_path: Path) -> None:
    out = tmp_path / "unequal.json"
    command = [sys.executable, str(ROOT / "benchmarks/denoise/unequal.py"), "--model", "tiny"]
    command += ["--devices", "cpu", "cpu", "--steps", "2", "4", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(out.read_text())["figures"].values()
    assert found["by hand"]["speeds"][0] != found["by hand"]["speeds"][1]
    assert found["cut as for equal ones"]["cuts"] == found["both alone"]["cuts"]
    # On CPUs components are not timed.
    assert found["found out"]["decided"] == []
    assert "of the ideal" in done.stdout
