"""Tests that are run as long as there is time, and begin elsewhere each time: options of pytest."""

from __future__ import annotations

import time
import zlib
from typing import Any

import pytest

NO_TIME = "not run: no time left"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("time")
    group.addoption(
        "--until",
        type=float,
        metavar="SECONDS",
        help="skip tests that would begin later than this (seconds since 1970, date +%%s)",
    )
    group.addoption(
        "--start-at",
        metavar="WORD",
        help="begin at a test that this word picks, a commit's hash say, and end with those before",
    )


@pytest.hookimpl(trylast=True)  # of the tests that are left after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    word = config.getoption("--start-at")
    if word is not None and items:
        first = zlib.crc32(word.encode()) % len(items)
        items[:] = items[first:] + items[:first]


@pytest.hookimpl(tryfirst=True)  # before any fixture
def pytest_runtest_setup(item: pytest.Item) -> None:
    until = item.config.getoption("--until")
    if until is not None and time.time() > until:
        pytest.skip(NO_TIME)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    left = [
        report.nodeid
        for report in terminalreporter.stats.get("skipped", [])
        if NO_TIME in str(report.longrepr)
    ]
    if left:
        terminalreporter.section(f"{NO_TIME}: {len(left)} tests")
        for name in left:
            terminalreporter.write_line(name)
