"""A denoiser whose ranks are in several processes computes the bits that it does in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import group_bits
import group_weights
import pytest
from group import run


def alike(in_group: list[Any], alone: Any) -> None:
    assert alone
    for found in in_group:
        assert found == alone


@pytest.mark.parametrize(
    "processes", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))]
)
def test_settings(processes: int, tmp_path: Path) -> None:
    """Every schedule; the last case with a process that owns two ranks."""
    results = run(group_bits.settings, processes, tmp_path)
    alike(results, group_bits.settings_alone(processes))
    for first, second, third in results[0]:
        assert first == second != third


@pytest.mark.parametrize(
    "processes", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))]
)
def test_only_the_first_gets_results(processes: int, tmp_path: Path) -> None:
    """The others' latents are noise, and do no harm."""
    mine, *others = run(group_bits.first, processes, tmp_path)
    alone = group_bits.settings_alone(processes)[: len(mine)]
    assert mine == alone
    assert all(other[i] != mine[i] for other in others for i in range(len(mine)))


@pytest.mark.slow
def test_calibrations(tmp_path: Path) -> None:
    """Process 0's is that of all, also where it alone gets noise predictions."""
    found = run(group_bits.calibrated, 2, tmp_path, ["all", "first"])
    alone = group_bits.calibrated_alone()
    assert found[:3] == [alone] * 3 and found[3][0] == alone[0]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_references(processes: int, tmp_path: Path) -> None:
    in_group = run(group_bits.references, processes, tmp_path)
    alike(in_group, group_bits.references_alone(processes))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_tokens(processes: int, tmp_path: Path) -> None:
    in_group = run(group_bits.tokens, processes, tmp_path)
    alone = group_bits.tokens_alone(processes)
    alike(in_group, alone)
    assert alone[0] == alone[1] and alone[2] == alone[3]


@pytest.mark.slow
def test_qualities(tmp_path: Path) -> None:
    alike(run(group_bits.qualities, 2, tmp_path), group_bits.qualities_alone(2))


@pytest.mark.slow
def test_a_process_without_room_for_all(tmp_path: Path) -> None:
    """All of them take other settings."""
    alone = group_bits.limited_alone(2)
    alike(run(group_bits.limited, 2, tmp_path), alone)
    assert "not each device has room" in alone[-1]


def test_weights_of_one_component_that_are_replaced(tmp_path: Path) -> None:
    """The processes that have no copies of them look as often at what they have."""
    for off in run(group_weights.replaced, 2, tmp_path):
        assert max(off) < 1e-10
