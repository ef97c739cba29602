"""A steady step of the drop-in makes few Python calls in our files, ranks' threads included."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import reference

import asyncdiff
import asyncdiff_core

SPEC = reference.SMALL
OURS = tuple(str(Path(str(m.__file__)).parent) for m in (asyncdiff, asyncdiff_core))
#: Calls of one step with two components, published schedule. Each costs a GPU's host a microsecond.
MOST = 120
STEPS, STEADY = 8, 5


def test_a_steady_step_makes_few_calls() -> None:
    calls: Counter[str] = Counter()
    counting = [False]

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if counting[0] and event == "call" and code.co_filename.startswith(OURS):
            calls[f"{Path(code.co_filename).name} {code.co_name}"] += 1

    pipe = reference.pipeline(SPEC)
    outer = sys.getprofile()
    threading.setprofile(profile)  # before ranks have their threads
    sys.setprofile(profile)
    try:
        handle = asyncdiff.parallelize(pipe, devices=["cpu"] * 2, components=2, split="estimate")
        reference.run(pipe, SPEC, num_inference_steps=STEPS)
        forward, step = handle.forward, [0]

        def counted(*args: Any) -> Any:
            steady = step[0] == STEADY
            step[0] += 1
            if steady:
                time.sleep(0.5)  # a rank that nobody waits for is still at work
                counting[0] = True
            try:
                return forward(*args)
            finally:
                if steady:
                    time.sleep(0.5)
                counting[0] = False

        handle.forward = counted  # type: ignore[method-assign]
        reference.run(pipe, SPEC, num_inference_steps=STEPS)
        handle.restore()
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]
        sys.setprofile(outer)
    assert 60 < calls.total() <= MOST, calls.most_common(20)
