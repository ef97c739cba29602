"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from export_cache import ExportCache


@pytest.fixture(scope="session", autouse=True)
def shared_exports() -> Iterator[ExportCache]:
    """torch.export, once for each structure of a denoiser in a process of tests."""
    with pytest.MonkeyPatch.context() as patch:
        cache = ExportCache()
        patch.setattr(torch.export, "export", cache)
        yield cache
