"""What a profiler's trace says of a GPU's time: on traces made up here."""

from __future__ import annotations

from typing import Any

import pytest

from denoise.trace import KINDS, by_gpu, longest, pauses, report, shares


def _event(name: str, begin: float, us: float, gpu: int = 0, cat: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": us, "args": {"device": gpu}}


GET = "asyncdiff::(anonymous namespace)::get_kernel(asyncdiff::ReceiverDevice, int)"
PUT = "void asyncdiff::(anonymous namespace)::put_kernel<asyncdiff::Puts<1, 8> >(...)"
TRACE = {
    "traceEvents": [
        _event("conv", 0, 40),
        _event(PUT, 30, 20),  # 10 of it beside computing
        _event(GET, 45, 25),  # 5 of it while the put still moves
        _event("gemm", 80, 20),
        _event("cudaLaunchKernel", 0, 100, cat="cuda_runtime"),
        _event("Memcpy DtoD", 10, 30, gpu=1, cat="gpu_memcpy"),
        {"ph": "M", "name": "process_name"},
    ]
}


def test_the_first_kind_that_is_under_way_counts() -> None:
    gpus = by_gpu(TRACE)
    assert list(gpus) == [0, 1] and [w.kind for w in gpus[0]] == [
        "computes",
        "moves",
        "waits",
        "computes",
    ]
    assert shares(gpus[0], 0, 100) == pytest.approx(
        dict(zip(KINDS, (0.6, 0.1, 0.2, 0.1), strict=True))
    )
    assert shares(gpus[0], 35, 75) == pytest.approx(
        dict(zip(KINDS, (5 / 40, 10 / 40, 20 / 40, 5 / 40), strict=True))
    )
    assert shares(gpus[1], 0, 100)["moves"] == pytest.approx(0.3)


def test_pauses_lie_between_computing() -> None:
    (pause,) = pauses(by_gpu(TRACE)[0], 0, 100)
    assert (pause.before, pause.after, pause.us) == ("conv", "gemm", 40)
    assert pause.kinds == pytest.approx({"computes": 0, "moves": 10, "waits": 20, "idles": 10})
    assert longest([pause, pause], 3) == [["80", "2", "10.0", "20.0", "10.0", "conv", "gemm"]]


def test_a_report_of_the_middle() -> None:
    text = report(TRACE)
    assert "0.1 ms in the middle of 0.1" in text
    assert "| 0 | 20.0 % | 20.0 % | 40.0 % | 20.0 % |" in text  # from 40 to 90
    with pytest.raises(ValueError, match="no work of a GPU"):
        report({"traceEvents": []})
