"""Two hosts, as far as one machine has them: network namespaces that a cable connects."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

#: Of the second host, and the first.
ADDRESSES = ("10.77.31.1", "10.77.31.2")


class TwoHosts:
    """What runs on one of them sees the other's address alone."""

    def __init__(self) -> None:
        self._names = [f"asyncdiff-{os.getpid()}-{host}" for host in "ab"]
        self._cables = [f"ad{os.getpid()}{host}" for host in "ab"]

    def connect(self) -> None:
        """Make both. Raises RuntimeError where that is not allowed."""
        for name in self._names:
            _ip("netns", "add", name)
        one, other = self._cables
        _ip("link", "add", one, "type", "veth", "peer", "name", other)
        for name, cable, address in zip(self._names, self._cables, ADDRESSES, strict=True):
            _ip("link", "set", cable, "netns", name)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            _ip("-n", name, "link", "set", cable, "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def cut(self) -> None:
        """Pull the cable."""
        _ip("-n", self._names[0], "link", "set", self._cables[0], "down")

    def interface(self, host: int) -> str:
        """The end of the cable on one of them."""
        return self._cables[host]

    def start(self, host: int, *command: str, **more: Any) -> subprocess.Popen[str]:
        """Start a program on one of them; ``more`` is for its environment."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self._names[host], sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {
                "ASYNCDIFF_HOST": f"host {host}",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            }
            | more,
        )

    def remove(self) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _ip(*command: str) -> None:
    done = subprocess.run(["ip", *command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(command)}: {done.stderr.strip()}")


@pytest.fixture
def two_hosts() -> Iterator[TwoHosts]:
    made = TwoHosts()
    try:
        made.connect()
    except (OSError, RuntimeError) as e:
        made.remove()
        pytest.skip(f"network namespaces cannot be made here: {e}")
    yield made
    made.remove()
