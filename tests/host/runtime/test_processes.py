"""A denoiser whose ranks are in several processes computes the bits that it does in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import group_bits
import pytest
from group import run


def alike(results: list[Any]) -> None:
    *in_group, alone = results
    assert alone
    for found in in_group:
        assert found == alone


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_settings(processes: int, tmp_path: Path) -> None:
    """Every schedule; the last case with a process that owns two ranks."""
    results = run(group_bits.settings, processes, tmp_path)
    alike(results)
    for first, second, third in results[0]:
        assert first == second != third


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_references(processes: int, tmp_path: Path) -> None:
    alike(run(group_bits.references, processes, tmp_path))


def test_qualities(tmp_path: Path) -> None:
    alike(run(group_bits.qualities, 2, tmp_path))
