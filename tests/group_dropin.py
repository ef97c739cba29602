"""The drop-in's own tests, run by several processes at once, which share out the ranks."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from group import Member
from torch.utils import _pytree as pytree

import asyncdiff
from asyncdiff.denoiser import AsyncDenoiser

FOLDER = Path(__file__).parent / "host" / "integrations"
#: Tests of what process 0 does for all, and of devices that no rank is on.
APART = (
    "test_a_prepared_size_waits_for_nothing",
    "test_progress_is_told",
    "test_as_many_components_as_devices_share_out_tokens",
)
FEWER = "has fewer ranks than there are processes"

#: By test: how it ended, and the cuts and digests of what it drew.
Found = dict[str, tuple[str, list[tuple[str, str]]]]


def shares(devices: Sequence[Any], processes: int) -> list[list[Any]]:
    """The devices of each process: one, and the last one's are the rest."""
    last = processes - 1
    return [*([d] for d in devices[:last]), list(devices[last:])]


def digest(tensors: Iterable[torch.Tensor]) -> str:
    values = (x.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for x in tensors)
    return hashlib.sha1(b"".join(values)).hexdigest()


class InGroup:
    """A plugin of pytest. The ranks of each pipeline are shared out among the processes; one
    process has all of them, as ever. Tests with fewer ranks than ``least`` are skipped."""

    def __init__(self, member: Member, least: int) -> None:
        self.found: Found = {}
        self._process, self._processes, self._least = member.process, member.processes, least
        self._group = member.group() if self._processes > 1 else None
        self._drawn: list[tuple[str, str]] = []

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Have pipelines made of the group, and note what denoisers return and what is drawn."""
        parallelize, call, draw = asyncdiff.parallelize, AsyncDenoiser.call, tiny_pipelines.draw

        @functools.wraps(parallelize)
        def of_group(pipe: Any, devices: Any = None, **settings: Any) -> Any:
            if "group" in settings or not isinstance(devices, list):
                return parallelize(pipe, devices, **settings)
            if len(devices) < self._least:
                pytest.skip(FEWER)
            if self._group is None:
                return parallelize(pipe, devices, **settings)
            mine = shares(devices, self._processes)[self._process]
            return parallelize(pipe, mine, **{"deadline": 30.0} | settings, group=self._group)

        @functools.wraps(call)
        def predicted(denoiser: AsyncDenoiser, *args: Any, **kwargs: Any) -> Any:
            result = call(denoiser, *args, **kwargs)
            # Parts of a batch that wait for the others are looked at by the sampler only.
            tensors = [x for x in pytree.tree_leaves(result) if type(x) is torch.Tensor]
            self._drawn.append((str(denoiser.partition.cuts), digest(tensors)))
            return result

        @functools.wraps(draw)
        def drawn(*args: Any, **kwargs: Any) -> torch.Tensor:
            result = draw(*args, **kwargs)
            self._drawn.append(("", digest([result])))
            return result

        patch.setattr(asyncdiff, "parallelize", of_group)
        patch.setattr(AsyncDenoiser, "call", predicted)
        patch.setattr(tiny_pipelines, "draw", drawn)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note how a test ended."""
        name = report.nodeid.split("::", 1)[-1]
        if report.when == "call" or report.outcome != "passed":
            failed = report.outcome == "failed"
            said = report.longreprtext[-2000:] if failed else report.outcome
            self.found[name] = said, sorted(self._drawn)
        if report.when == "teardown":
            self._drawn.clear()


def dropin(member: Member) -> Found:
    """What tests of the drop-in do. The option: the ranks that they have at least, their file, and
    words for pytest's -k."""
    least, file, words = member.option.split(" ", 2)
    plugin = InGroup(member, int(least))
    with pytest.MonkeyPatch.context() as patch:
        plugin.install(patch)
        chosen = " and ".join([*(f"not {name}" for name in APART), *filter(None, [words])])
        options = ["-q", "-p", "no:cacheprovider", "-m", "slow or not slow", "-k", chosen]
        pytest.main([str(FOLDER / file), *options], plugins=[plugin])
    return plugin.found
