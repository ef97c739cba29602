"""Bundles that cross compressed between processes, of one host and of several."""

from __future__ import annotations

from pathlib import Path

import group_compressed
import pytest
from group import run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hosts", "results"),
    [("aa", "all"), ("aa", "first"), ("ab", "all"), ("aab", "all"), ("abc", "first")],
)
def test_the_bits_are_those_of_one_process(hosts: str, results: str, tmp_path: Path) -> None:
    count = len(hosts)
    found = run(group_compressed.drawn, count, tmp_path, [results], hosts=hosts)
    alone = group_compressed.alone(count)
    assert count > 2 or alone[0] == alone[1]  # "auto" did compress
    assert found[0] == alone
    assert found == [alone] * count or results == "first"
