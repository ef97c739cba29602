"""Ctrl-C ends a wait on the host, and what was waited for can be waited for again."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from core_bundles import receive

import asyncdiff_core as core

LAYOUT = core.Layout([core.TensorSpec("int64", (3,))])


def interrupt_soon(thread: int | None) -> threading.Thread:
    """A SIGINT that the kernel gives to this thread, or to the new one."""

    def send() -> None:
        time.sleep(0.1)
        signal.pthread_kill(thread or threading.get_ident(), signal.SIGINT)

    sender = threading.Thread(target=send)
    sender.start()
    return sender


@pytest.mark.parametrize("here", [True, False], ids=["waiting thread", "other thread"])
@pytest.mark.parametrize("operation", ["get", "begin", "put"])
def test_an_interrupt_ends_a_wait_at_once(operation: str, here: bool) -> None:
    fabric = core.HostFabric(2, deadline=30)
    channel = fabric.channel(0, [1], LAYOUT, slots=1)
    sent = np.arange(3)
    calls: dict[str, Callable[[], None]] = {
        "get": lambda: channel.get(1, 0),
        "begin": lambda: channel.begin(0),
        "put": lambda: channel.put([sent], 0),
    }
    sending = operation in ("begin", "put")
    if sending:
        channel.put([sent], 0)
    begun = time.monotonic()
    sender = interrupt_soon(threading.get_ident() if here else None)
    with pytest.raises(KeyboardInterrupt):
        calls[operation]()
    assert time.monotonic() - begun < 5
    sender.join()

    # It was not done, and nothing has failed.
    fabric.check()
    if sending:
        receive(channel, 1, 0)
    else:
        channel.put([sent], 0)
    calls[operation]()


def test_a_handler_that_returns_lets_the_wait_go_on() -> None:
    channel = core.HostFabric(2, deadline=30).channel(0, [1], LAYOUT)
    seen = []

    def handle(*_: object) -> None:
        seen.append(time.monotonic())
        channel.put([np.arange(3)], 0)

    before = signal.signal(signal.SIGINT, handle)
    try:
        sender = interrupt_soon(threading.get_ident())
        channel.get(1, 0)  # would wait until the deadline
        sender.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(seen) == 1


def test_an_interrupt_while_an_error_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    channel = core.HostFabric(2, deadline=0.01).channel(0, [1], LAYOUT)
    monkeypatch.setattr(core.ExchangeTimeout, "__init__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        channel.get(1, 0)
