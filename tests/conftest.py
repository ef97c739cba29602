"""Fixtures of all tests, and what spares all of them time."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import until
from export_cache import ExportCache

# Hooks of pytest.
pytest_addoption = until.pytest_addoption
pytest_collection_modifyitems = until.pytest_collection_modifyitems
pytest_runtest_setup = until.pytest_runtest_setup
pytest_terminal_summary = until.pytest_terminal_summary

# Who compiles in other processes says so.
os.environ.setdefault("ASYNCDIFF_COMPILE_WORKERS", "0")

# Looking for cycles among the million objects of torch and what it exports is a tenth of a test's
# time. Tests of what is freed collect by themselves.
gc.set_threshold(100_000, 50, 1000)


def pytest_collection_finish() -> None:
    """What was imported stays."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def shared_exports() -> Iterator[ExportCache]:
    """torch.export, once for each structure of a denoiser in a process of tests."""
    with pytest.MonkeyPatch.context() as patch:
        cache = ExportCache()
        cache.install(patch)
        yield cache
