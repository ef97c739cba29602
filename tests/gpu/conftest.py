"""GPU tests: skipped, with the reason, where there is nothing to run them on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import asyncdiff_core as core
from asyncdiff.preparation import captures, cuts, links
from asyncdiff.preparation.folder import Folder


@pytest.fixture(scope="session", autouse=True)
def nothing_kept() -> Iterator[None]:
    """Tests keep no preparations; what puts cost is kept as ever."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (captures, cuts, links):
            patch.setattr(module, "preparations", lambda: Folder(None))
        yield


def _missing() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if not core.cuda_built():
        return "asyncdiff_core was built without CUDA"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _missing()
    for item in items:
        if "gpu" not in item.path.parts:
            continue
        item.add_marker("gpu")
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def full_float32() -> Iterator[None]:
    """Products and convolutions without TF32, the same ones every time."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    yield
    torch.cuda.synchronize()


#: Where ranks may lie: all on one GPU, or spread over all there are.
PLACES = ("one GPU", "several GPUs")


def devices_for(place: str, ranks: int) -> list[int]:
    """CUDA device indices, one a rank; skips where there are too few GPUs."""
    if place == "one GPU":
        return [0] * ranks
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("needs two GPUs")
    return [r % count for r in range(ranks)]
