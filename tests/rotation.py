"""Cases of a test of which a few are tried every time, and the others in CI, in rotation."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def often(chosen: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Parameters of ``cases``, slow but for those ``chosen``."""
    cases = list(cases)
    assert all(one in cases for one in chosen), "a case that there is not"
    return [one if one in chosen else _slow(one) for one in cases]


def _slow(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
