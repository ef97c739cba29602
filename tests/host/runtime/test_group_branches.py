"""Branches and two denoisers, whose ranks are in several processes, compute what they do in one."""

from __future__ import annotations

from pathlib import Path

import group_branches
import pytest
from group import run

pytestmark = pytest.mark.slow


def test_settings(tmp_path: Path) -> None:
    results = run(group_branches.settings, 2, tmp_path)
    alone = [group_branches.alone(i) for i in range(len(group_branches.SETTINGS))]
    for found in results:
        assert found == alone


def test_only_the_first_gets_results(tmp_path: Path) -> None:
    mine, other = run(group_branches.first, 2, tmp_path)
    assert mine == group_branches.alone(1)
    assert all(a != b for a, b in zip(mine, other, strict=True))


def test_two_denoisers_have_a_checkpoint_each(tmp_path: Path) -> None:
    alone = group_branches.checkpoint_alone()
    assert run(group_branches.checkpoint, 2, tmp_path) == [alone, alone]
