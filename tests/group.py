"""Runs what a test does in several processes of a group, each with a denoiser of the group.

    python group.py MODULE FUNCTION PROCESSES FOLDER [OPTION ...]

imports MODULE once, then forks: function(member) of each process returns what the test gets; once
for each option, in new processes. Nothing is computed before: torch's kernels may hang in a child
of a process that has used them.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from export_cache import ExportCache

SECONDS = 100
#: In the environment: a letter for each process, its host's.
HOSTS = "ASYNCDIFF_TEST_HOSTS"
#: In the environment: that processes are not forked, and which one this is.
SPAWN, SPAWNED = "ASYNCDIFF_TEST_SPAWN", "ASYNCDIFF_TEST_PROCESS"


@dataclass
class Member:
    """One of ``processes`` that meet in ``folder``."""

    process: int
    processes: int
    folder: Path
    option: str = ""

    def group(self, name: str = "store", processes: list[int] | None = None) -> Any:
        """The ProcessGroup of some of the processes (None: all), made anew for each ``name``."""
        members = list(range(self.processes)) if processes is None else processes
        if dist.is_initialized():
            dist.destroy_process_group()
        store = dist.FileStore(str(self.folder / name), len(members))
        rank = members.index(self.process)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=len(members))
        return dist.group.WORLD

    def die(self) -> None:
        """End at once, as if somebody had pulled the plug."""
        os.kill(os.getpid(), signal.SIGKILL)


def run(
    function: Callable[[Member], Any],
    processes: int,
    folder: Path,
    options: Sequence[str] = ("",),
    fork: bool = True,
    hosts: str = "",
) -> list[Any]:
    """What ``function``, of a module beside this one, returned in each process (JSON); minus the
    signal where one was killed; for each option, one after another. ``fork``: not for CUDA, which
    no child inherits. ``hosts``: a letter for each process, its host's; else they are on one."""
    command = [sys.executable, __file__, function.__module__, function.__name__]
    done = subprocess.run(
        [*command, str(processes), str(folder), *options],
        capture_output=True,
        text=True,
        timeout=SECONDS * (1 + len(options)),
        env=os.environ
        | ({} if fork else {SPAWN: "1"})
        | ({HOSTS: hosts} if hosts else {})
        | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
    )
    hangs = [p.read_text() for p in sorted(folder.glob("*/hangs-*"))]
    assert done.returncode == 0, "\n".join([*filter(None, hangs), done.stderr[-8000:]])
    return json.loads(done.stdout.splitlines()[-1])


def _child(function: Callable[[Member], Any], member: Member) -> None:
    # Nothing of a test stays behind, and whoever hangs says where.
    said = (member.folder / f"hangs-{member.process}").open("w")
    faulthandler.dump_traceback_later(SECONDS, exit=True, file=said)
    torch.export.export = ExportCache()
    if HOSTS in os.environ:
        os.environ["ASYNCDIFF_HOST"] = os.environ[HOSTS][member.process]
        os.environ["ASYNCDIFF_INTERFACE"] = "lo"
    try:
        result = function(member)
        (member.folder / f"result-{member.process}").write_text(json.dumps(result))
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def main() -> int:
    module, name, processes, folder, *options = sys.argv[1:]
    function = getattr(importlib.import_module(module), name)
    if SPAWNED in os.environ:
        process = int(os.environ[SPAWNED])
        place = Path(folder) / f"of-{options[0]}"
        _child(function, Member(process, int(processes), place, options[0]))
    results, codes = [], []
    for option in options:
        place = Path(folder) / f"of-{option}"
        place.mkdir()
        children = []
        for process in range(int(processes)):
            if SPAWN in os.environ:
                us = [sys.executable, __file__, module, name, processes, folder, option]
                spawned = os.environ | {SPAWNED: str(process)}
                children.append(os.posix_spawn(sys.executable, us, spawned))
                continue
            child = os.fork()
            if child == 0:
                _child(function, Member(process, int(processes), place, option))
            children.append(child)
        codes += [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        results += [
            json.loads((place / f"result-{p}").read_text()) if code == 0 else code
            for p, code in enumerate(codes[-len(children) :])
        ]
    print(json.dumps(results))
    return 1 if any(code > 0 for code in codes) else 0


if __name__ == "__main__":
    sys.exit(main())
