"""A parallelised pipeline in a process that was made by fork(), without the ranks' threads."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import reference
from tiny_pipelines import draw, tiny_sd
from toys import toy, toy_call

import asyncdiff
from asyncdiff import AsyncDenoiser, InputError
from asyncdiff.generation.spec import GenerationSpec

SECONDS = 60


def in_child(work: Callable[[], Any]) -> int | None:
    """The exit code of a child that does ``work``: 0 if it went well; None if it hangs."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")


def test_a_child_is_told() -> None:
    """Also where a generation was under way, in another thread."""
    pipe, call = tiny_sd()
    want = draw(pipe, call)
    handle = asyncdiff.parallelize(pipe, devices=["cpu"] * 2, warmup=4, split="estimate")
    draw(pipe, call)

    def work() -> None:
        for _ in range(2):
            with pytest.raises(InputError, match=r"made by fork\(\).*restore\(\).*'spawn'"):
                draw(pipe, call)
        handle.restore()
        assert reference.distance(draw(pipe, call), want) == 0

    assert in_child(work) == 0
    codes: list[int | None] = []

    def callback(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        if step == 1:  # while this thread holds the denoiser's lock
            thread = threading.Thread(target=lambda: codes.append(in_child(work)))
            thread.start()
            thread.join(2 * SECONDS)
        return kwargs

    assert reference.distance(draw(pipe, call, callback_on_step_end=callback), want) < 1e-5
    assert codes == [0]
    handle.restore()


def test_a_denoiser_in_a_child() -> None:
    denoiser = AsyncDenoiser(
        toy(), devices=["cpu"] * 2, split="estimate", example_kwargs=toy_call()
    )

    spec = GenerationSpec.of(denoiser.config, [9, 8])

    def work() -> None:
        for use in (
            lambda: denoiser(**toy_call()),
            lambda: denoiser.start(spec),
        ):
            with pytest.raises(InputError, match=r"made by fork\(\)"):
                use()
        denoiser.close()
        denoiser.close()

    assert in_child(work) == 0
    with denoiser.generation([9, 8]):
        denoiser(**toy_call())
    denoiser.close()
