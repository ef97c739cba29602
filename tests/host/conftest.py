"""What holds for all tests without GPUs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def nothing_kept() -> Iterator[None]:
    """Tests, and processes that they start, keep no preparations, but for those of keeping them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASYNCDIFF_CACHE", "off")
        yield
