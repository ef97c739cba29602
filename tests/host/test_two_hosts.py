"""Two network namespaces, a cable between them: fabrics, denoisers and programs over both."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from two_hosts import ADDRESSES, TwoHosts, two_hosts

__all__ = ["two_hosts"]
STACKS = Path(__file__).parents[2] / "examples" / "stacks"

CORE = """
import json, sys, time
import numpy as np
import asyncdiff_core as core
from core_bundles import receive
process, address, until = int(sys.argv[1]), sys.argv[2], sys.argv[3]
meeting = core.SocketRendezvous((address, 29600), process, 2, authkey=b"two hosts", timeout=20)
fabric = core.HostFabric(2, deadline=6, rendezvous=meeting)
layout = core.Layout([core.TensorSpec("int64", (100_000,))])
ways = [fabric.channel(r, [1 - r], layout) for r in range(2)]
for i in range(50):
    ways[process].put([np.full(100_000, 1000 * process + i)], i % 2)
    (got,) = receive(ways[1 - process], process, i % 2)
    assert got[0] == got[-1] == 1000 * (1 - process) + i
print(json.dumps({"links": sorted(set(fabric.links().values()))}), flush=True)
if until == "cut":
    begun = time.monotonic()
    try:
        receive(ways[1 - process], process, 0)
    except core.CoreError as e:
        print(json.dumps({"error": type(e).__name__, "process": getattr(e, "process", None),
                          "text": str(e), "seconds": time.monotonic() - begun}))
fabric.close()
"""


def ended(programs: list[subprocess.Popen[str]]) -> list[str]:
    """What programs have written, once they have ended well."""
    try:
        said = [program.communicate(timeout=250) for program in programs]
    finally:
        for program in programs:
            program.kill()
    for program, (_, errors) in zip(programs, said, strict=True):
        assert program.returncode == 0, errors[-6000:]
    return [out for out, _ in said]


@pytest.mark.parametrize("until", ["end", pytest.param("cut", marks=pytest.mark.slow)])
def test_the_core(until: str, two_hosts: TwoHosts, tmp_path: Path) -> None:
    """Addresses are found without being told; a cable that is pulled is a host that is gone."""
    (tmp_path / "core.py").write_text(CORE)
    programs = [
        two_hosts.start(p, str(tmp_path / "core.py"), str(p), ADDRESSES[0], until) for p in range(2)
    ]
    if until == "cut":
        for program in programs:
            assert program.stdout is not None and "links" in program.stdout.readline()
        two_hosts.cut()
    said = [json.loads(out) for out in ended(programs)]
    if until == "end":
        assert all(one == {"links": ["memory", "sockets"]} for one in said)
        return
    for process, one in enumerate(said):
        assert one["error"] == "ProcessLost" and one["process"] == 1 - process
        assert "said nothing for 3 s: its host is down, or cannot be reached" in one["text"]
        assert one["seconds"] < 6


def torchrun(hosts: TwoHosts, *command: str) -> list[str]:
    """``torchrun --nnodes 2``, as the guide has it, a process on each of them."""
    programs = [
        hosts.start(
            host,
            *("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
            *("--node-rank", str(host), "--master-addr", ADDRESSES[0], "--master-port", "29500"),
            *command,
            GLOO_SOCKET_IFNAME=hosts.interface(host),
        )
        for host in range(2)
    ]
    return ended(programs)


@pytest.mark.slow
def test_diffusers(two_hosts: TwoHosts, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = torchrun(two_hosts, str(STACKS / "torchrun_diffusers.py"))
    assert "a picture of 16 x 16 pixels by 2 ranks" in first and not second
    assert (tmp_path / "torchrun_diffusers.png").exists()


@pytest.mark.slow
def test_the_command_line(two_hosts: TwoHosts, tmp_path: Path, monkeypatch: Any) -> None:
    """One process says what was drawn."""
    monkeypatch.chdir(tmp_path)
    command = ("generate", "--demo", "-p", "a cat", "--steps", "6", "--out", "cat.png")
    said = torchrun(two_hosts, "-m", "asyncdiff", *command)
    assert "".join(said).count("picture: ") == 1 and (tmp_path / "cat.png").exists()
