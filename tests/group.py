"""Runs what a test does in several processes of a group, each with a denoiser of the group.

    python group.py MODULE FUNCTION PROCESSES FOLDER [OPTION ...]

makes the processes: function(member) of each returns what the test gets; once for each option, in
new processes. They are forked from one that has imported what they need, by

    python group.py

which reads such arguments from its input, a line of JSON each, for as long as tests run. Nothing is
computed before the fork: torch's kernels may hang in a child of a process that has used them.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from export_cache import ExportCache
from processes import STARTED

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
    arguments = [function.__module__, function.__name__, str(processes), str(folder), *options]
    said = {HOSTS: hosts} if hosts else {}
    seconds = SECONDS * (1 + len(options))
    code = (_server().run if fork else _spawn)(arguments, said, seconds)
    hangs = [p.read_text() for p in sorted(folder.glob("*/hangs-*"))]
    errors = (folder / "stderr").read_text()
    assert code == 0, "\n".join([*filter(None, hangs), errors[-8000:]])
    started, results = json.loads((folder / "stdout").read_text().splitlines()[-1])
    STARTED.update(started)
    return list(results)


def _environment() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


def _spawn(arguments: Sequence[str], said: dict[str, str], seconds: float) -> int:
    folder = Path(arguments[3])
    with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as errors:
        return subprocess.run(
            [sys.executable, __file__, *arguments],
            stdout=out,
            stderr=errors,
            timeout=seconds,
            env=os.environ | _environment() | said | {SPAWN: "1"},
        ).returncode


class _Server:
    """The process that those of a test are forked from."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | _environment(),
            start_new_session=True,  # so that all can be ended
        )
        atexit.register(self.close)

    def close(self) -> None:
        """End it: its input ends."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(self, arguments: Sequence[str], said: dict[str, str], seconds: float) -> int:
        """The exit code of main() with these arguments, in a process of its own that has ``said``
        in its environment, too."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([arguments, said]).encode() + b"\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not ready:
            os.killpg(self._process.pid, signal.SIGKILL)
            _server.cache_clear()
            raise TimeoutError(f"{arguments} took more than {seconds} s")
        return int(self._process.stdout.readline())


@functools.cache
def _server() -> _Server:
    return _Server()


def serve() -> None:
    """Fork for each line of the input, and print the exit code."""
    # What exporting imports when it is used first.
    for name in ("torch._export.non_strict_utils", "torch._inductor.codecache", "networkx"):
        importlib.import_module(name)
    for line in sys.stdin:
        arguments, said = json.loads(line)
        importlib.import_module(arguments[0])
        gc.freeze()
        child = os.fork()
        if child == 0:
            folder = Path(arguments[3])
            for stream, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), stream)
            os.environ.update(said)
            code = main(*arguments)
            sys.stdout.flush()
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _child(function: Callable[[Member], Any], member: Member) -> None:
    # Nothing of a test stays behind, and whoever hangs says where.
    said = (member.folder / f"hangs-{member.process}").open("w")
    faulthandler.dump_traceback_later(SECONDS, exit=True, file=said)
    ExportCache().install(pytest.MonkeyPatch())
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


def main(module: str, name: str, processes: str, folder: str, *options: str) -> int:
    function = getattr(importlib.import_module(module), name)
    if SPAWNED in os.environ:
        process = int(os.environ[SPAWNED])
        place = Path(folder) / f"of-{options[0]}"
        _child(function, Member(process, int(processes), place, options[0]))
    results, codes, started = [], [], []
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
        started += children
        codes += [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        results += [
            json.loads((place / f"result-{p}").read_text()) if code == 0 else code
            for p, code in enumerate(codes[-len(children) :])
        ]
    print(json.dumps([started, results]))
    return 1 if any(code > 0 for code in codes) else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if sys.argv[1:] else serve())
