"""The threads that issue the ranks' work on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from asyncdiff.runtime.executor import RankQueue


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_ranks_share_the_threads_and_nobody_else_is_concerned(four_threads: None) -> None:
    queue = RankQueue([0, 1], lambda rank, reason: None, threads=True)

    def elsewhere() -> int:
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return seen[0]

    try:
        assert torch.get_num_threads() == 4
        assert elsewhere() == 4
        shares = [queue.result(queue.submit(r, torch.get_num_threads)) for r in (0, 1)]
        assert shares == [2, 2]
        assert elsewhere() == 4
    finally:
        queue.close()
    assert torch.get_num_threads() == 4
