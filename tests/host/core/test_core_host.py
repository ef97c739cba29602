"""Channels between threads: what arrives, who waits, and that nothing hangs."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from core_bundles import read

import asyncdiff_core as core
from asyncdiff_core.arrays import describe

LAYOUT = core.Layout([core.TensorSpec("float32", (3, 5)), core.TensorSpec("int64", (7,))])


def bundle(n: int) -> list[np.ndarray]:
    return [np.full((3, 5), n, np.float32), np.arange(n, n + 7)]


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("receivers", [[1], [2, 1, 3]])
def test_stress(slots: int, receivers: list[int]) -> None:
    """Random delays on both sides; every bundle arrives once, whole and in order."""
    fabric = core.HostFabric(4)
    channel = fabric.channel(0, receivers, LAYOUT, slots=slots)
    count = 300

    def send() -> None:
        rng = random.Random(0)
        for n in range(count):
            channel.put(bundle(n), n % slots)
            if rng.random() < 0.1:
                time.sleep(rng.random() * 1e-3)

    def receive(rank: int) -> None:
        rng = random.Random(rank)
        for n in range(count):
            channel.get(rank, n % slots)
            first, second = read(channel, rank, n % slots)
            if rng.random() < 0.1:
                time.sleep(rng.random() * 1e-3)
            assert (first == n).all()
            assert (second == np.arange(n, n + 7)).all()
            channel.release(rank, n % slots)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(send), *(pool.submit(receive, r) for r in receivers)]:
            future.result()
    fabric.check()


def test_torch_tensors_of_any_dense_layout() -> None:
    tensor = torch.randn(2, 4, 6, 8).to(torch.bfloat16).to(memory_format=torch.channels_last)
    layout = core.Layout([core.TensorSpec("bfloat16", tensor.shape, tensor.stride())])
    channel = core.HostFabric(2).channel(0, [1], layout)
    channel.put([tensor], 0)
    channel.get(1, 0)
    raw = torch.from_numpy(np.asarray(channel.slot(1, 0)))
    got = raw[: layout.specs[0].nbytes].view(torch.bfloat16)
    assert torch.equal(got.as_strided(tensor.shape, tensor.stride()), tensor)


class OnlyDLPack:
    """An array of a library that has nothing else."""

    def __init__(self, array: torch.Tensor) -> None:
        self.array = array

    def __dlpack__(self) -> object:
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 5),
        torch.randn(4, 6).T,
        torch.randn(2, 9)[1],
        torch.arange(7),
        torch.randn(5).to(torch.bfloat16),
        torch.tensor([True, False]),
        torch.randn(2, 3).to(torch.complex64),
        torch.zeros(0, 3),
        torch.tensor(2.5),
    ],
)
def test_dlpack_arrays(tensor: torch.Tensor) -> None:
    found = describe(OnlyDLPack(tensor))
    assert found.pointer == tensor.data_ptr()
    assert found.dtype == str(tensor.dtype).removeprefix("torch.")
    assert found.shape == tuple(tensor.shape)
    spec = core.TensorSpec(found.dtype, tensor.shape, tensor.stride())
    assert spec.same_strides(found.strides)
    channel = core.HostFabric(2).channel(0, [1], core.Layout([spec]))
    channel.put([OnlyDLPack(tensor)], 0)
    channel.get(1, 0)
    raw = torch.from_numpy(np.asarray(channel.slot(1, 0)))[: spec.nbytes]
    assert torch.equal(raw.view(tensor.dtype).as_strided(spec.shape, spec.strides), tensor)


def test_a_sender_waits_for_a_free_slot() -> None:
    channel = core.HostFabric(2).channel(0, [1], LAYOUT, slots=2)
    channel.put(bundle(0), 0)
    channel.put(bundle(1), 1)
    begun = threading.Event()

    def third() -> None:
        channel.begin(0)
        begun.set()

    thread = threading.Thread(target=third)
    thread.start()
    assert not begun.wait(0.05)
    channel.get(1, 0)
    assert (read(channel, 1, 0)[0] == 0).all()
    channel.release(1, 0)
    thread.join(5)
    assert begun.is_set()


def test_timeouts_say_who_waited_for_whom() -> None:
    fabric = core.HostFabric(3, deadline=0.05)
    channel = fabric.channel(2, [0], LAYOUT, name="up")
    with pytest.raises(core.ExchangeTimeout, match="rank 0, channel 'up', get of slot 0") as caught:
        channel.get(0, 0)
    error = caught.value
    assert (error.rank, error.peer, error.channel, error.slot) == (0, 2, "up", 0)
    assert (error.expected, error.seen, error.operation) == (1, 0, "get")
    # It ends the exchange for all, until a reset.
    with pytest.raises(core.ExchangeTimeout):
        fabric.check()
    with pytest.raises(core.ExchangeTimeout):
        channel.begin(0)
    fabric.reset()
    fabric.check()
    channel.put(bundle(0), 0)
    channel.put(bundle(1), 1)
    with pytest.raises(core.ExchangeTimeout) as caught:
        channel.begin(0)
    assert (caught.value.operation, caught.value.peer) == ("begin", 0)


def test_an_abort_ends_waits_at_once() -> None:
    fabric = core.HostFabric(2, deadline=60)
    channel = fabric.channel(0, [1], LAYOUT)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(channel.get, 1, 0)
        time.sleep(0.05)
        fabric.abort(0, "out of ideas")
        with pytest.raises(core.Aborted, match="rank 0 aborted the exchange: out of ideas") as e:
            waiting.result(timeout=5)
    assert e.value.rank == 0
    with pytest.raises(core.Aborted):
        fabric.check()


ORDERS = {
    "begin": "slot 0 is next (0 bundles so far)",
    "begin twice": "the bundle before it has begun and is not committed: commit it first",
    "begin twice, next slot": "the bundle before it has begun and is not committed",
    "commit": "no bundle has begun: begin comes first",
    "commit, other slot": "slot 0 is next",
    "push": "no bundle has begun: begin comes first",
    "push, other slot": "slot 0 is next",
    "get": "slot 0 is next",
    "release": "no bundle is held: a slot is released once, after it was got",
}


@pytest.mark.parametrize("case", ORDERS)
def test_slots_out_of_turn(case: str) -> None:
    fabric = core.HostFabric(2)
    channel = fabric.channel(0, [1], LAYOUT)
    if case.endswith("slot") or case == "begin twice":
        channel.begin(0)
    with pytest.raises(core.SlotOrderError) as caught:
        if case.startswith("begin"):
            channel.begin(0 if case == "begin twice" else 1)
        elif case.startswith("commit"):
            channel.commit(int("other" in case))
        elif case.startswith("push"):
            channel.push(0, bundle(0)[0], int("other" in case))
        elif case == "get":
            channel.get(1, 1)
        else:
            channel.release(1, 0)
    assert ORDERS[case] in str(caught.value)
    # It does not say that the slot is next which was named.
    slot = caught.value.slot
    assert f"slot {slot} is next" not in str(caught.value)
    assert caught.value.operation == case.split()[0].rstrip(",")
    with pytest.raises(core.SlotOrderError) as again:
        fabric.check()
    assert str(again.value) == str(caught.value)


def test_wrong_tensors_are_refused_before_anything_is_sent() -> None:
    channel = core.HostFabric(2).channel(0, [1], LAYOUT)
    good = bundle(0)
    for bad, message in [
        ([good[0]], "1 tensors for channel"),
        ([good[0].astype(np.float64), good[1]], "float64"),
        ([good[0].T, good[1]], r"\(5, 3\)"),
        ([np.zeros((5, 3), np.float32).T, good[1]], "strides"),
        ([torch.zeros(3, 5, device="meta"), good[1]], "meta"),
        (["text", good[1]], "str is no array"),
        ([np.zeros((3, 5), ">f4"), good[1]], "cannot be exchanged"),
    ]:
        with pytest.raises(core.InvalidArgument, match=message):
            channel.put(bad, 0)
    channel.put(good, 0)  # nothing was begun


def test_wrong_ranks_slots_and_streams() -> None:
    fabric = core.HostFabric(2)
    for sender, receivers, slots, message in [
        (2, [1], 2, "ranks 0 to 1"),
        (0, [], 2, "at least one receiver"),
        (0, [0], 2, "cannot receive from itself"),
        (0, [1, 1], 2, "named twice"),
        (0, [1], 0, "1 to 1024 slots"),
    ]:
        with pytest.raises(core.InvalidArgument, match=message):
            fabric.channel(sender, receivers, LAYOUT, slots=slots)
    channel = fabric.channel(0, [1], LAYOUT)
    with pytest.raises(core.InvalidArgument, match="does not receive"):
        channel.get(0, 0)
    with pytest.raises(core.InvalidArgument, match="has 2 slots"):
        channel.begin(2)
    with pytest.raises(core.InvalidArgument, match="no CUDA stream"):
        channel.begin(0, stream="fast")
    with pytest.raises(core.InvalidArgument, match="has 2 tensors"):
        channel.push_pointer(5, 0, 0)
    for ranks, deadline in [(0, 1.0), (1, 0.0), (1, float("nan"))]:
        with pytest.raises(core.InvalidArgument):
            core.HostFabric(ranks, deadline=deadline)


def test_memory_outlives_a_closed_fabric() -> None:
    fabric = core.HostFabric(2)
    channel = fabric.channel(0, [1], LAYOUT)
    channel.put(bundle(5), 0)
    view = read(channel, 1, 0)[0]
    fabric.close()
    fabric.close()
    with pytest.raises(core.CoreError, match="closed"):
        channel.get(1, 0)
    del fabric, channel
    assert (view == 5).all()


def test_links_and_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    fabric = core.HostFabric(2)
    assert fabric.kind == "host"
    assert fabric.ranks == 2
    assert fabric.deadline == 10
    assert fabric.links() == {(a, b): "memory" for a in range(2) for b in range(2)}
    assert fabric.link_reasons() == {}
    monkeypatch.setenv("ASYNCDIFF_DEADLINE", "2.5")
    assert core.HostFabric(1).deadline == 2.5
    monkeypatch.setenv("ASYNCDIFF_DEADLINE", "soon")
    with pytest.raises(core.InvalidArgument, match=r"ASYNCDIFF_DEADLINE='soon'"):
        core.HostFabric(1)


@pytest.mark.skipif(core.cuda_devices() > 0, reason="there is a GPU")
def test_without_a_gpu_the_cuda_fabric_says_so() -> None:
    with pytest.raises(core.DeviceError, match=r"built without CUDA|no GPU"):
        core.CudaFabric([0, 0])


def test_puts_of_several_channels() -> None:
    fabric = core.HostFabric(3)
    one, all_ = fabric.channel(0, [1], LAYOUT), fabric.channel(0, [1, 2], LAYOUT)
    fabric.put_batch([(one, bundle(1), 0), (all_, bundle(2), 0)])
    one.get(1, 0)
    assert (read(one, 1, 0)[0] == 1).all()
    for rank in (1, 2):
        all_.get(rank, 0)
        assert (read(all_, rank, 0)[0] == 2).all()
    with pytest.raises(core.InvalidArgument, match="named twice"):
        fabric.put_batch([(one, bundle(1), 1), (one, bundle(1), 0)])
    with pytest.raises(core.InvalidArgument, match="different senders"):
        fabric.put_batch([(one, bundle(1), 1), (fabric.channel(1, [0], LAYOUT), bundle(1), 0)])
    other = core.HostFabric(3).channel(0, [1], LAYOUT)
    with pytest.raises(core.InvalidArgument, match="another fabric"):
        fabric.put_batch([(other, bundle(1), 0)])
    fabric.put_batch([])


@pytest.mark.parametrize("first", [5, 2**32 - 2, 2**64 - 4])
def test_counts_start_anywhere_and_may_wrap(first: int) -> None:
    fabric = core.HostFabric(2)
    channel = fabric.channel(0, [1], LAYOUT)
    fabric.reset(first)
    for n in range(first, first + 9):
        channel.put(bundle(n % 100), n % 2)
        channel.get(1, n % 2)
        assert (read(channel, 1, n % 2)[0] == n % 100).all()
        channel.release(1, n % 2)
    with pytest.raises(core.SlotOrderError):
        channel.put(bundle(0), first % 2)


def test_modes_by_name() -> None:
    fabric = core.HostFabric(2)
    assert fabric.channel(0, [1], LAYOUT).mode == "copy"
    assert fabric.channel(0, [1], LAYOUT, mode="inline").mode == "inline"
    with pytest.raises(core.InvalidArgument, match="auto, inline, kernel or copy"):
        fabric.channel(0, [1], LAYOUT, mode="magic")


COSTS = """asyncdiff put costs 3
2 3
1024 2 3 6
65536 5 4 7
1048576 0 10 10.5
"""


@pytest.mark.parametrize(
    ("nbytes", "tensors", "receivers", "mode"),
    [
        (16, 1, 1, "inline"),
        (1024, 1, 1, "inline"),
        (65536, 1, 1, "kernel"),
        (1 << 20, 1, 1, "copy"),  # a little slower, and leaves the multiprocessors alone
        (1 << 20, 3, 1, "kernel"),  # each further copy costs
        (1024, 1, 60, "kernel"),
        (1 << 24, 1, 1, "copy"),
    ],
)
def test_the_fastest_mode_by_costs(nbytes: int, tensors: int, receivers: int, mode: str) -> None:
    costs = core.PutCosts.from_text(COSTS)
    assert costs.inline_us == {1024: 2, 65536: 5}
    assert costs.copy_us[1 << 20] == 10.5
    assert costs.copy_node_us == 2
    assert costs.fastest(nbytes, tensors=tensors, receivers=receivers) == mode


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello\n1 1\n1 1 1 1",
        COSTS.replace("65536", "64"),
        COSTS.replace("10.5", "0"),
        COSTS.replace("2 3\n", "2 4\n", 1),
        COSTS.replace("2 3\n", "-2 3\n", 1),
        COSTS.replace("1024", "-1024"),
        COSTS.replace("1024", "0"),
        COSTS.replace("10.5", "nan"),
        COSTS.replace("10.5", "-1"),
    ],
)
def test_what_is_no_table_of_costs(text: str) -> None:
    from asyncdiff_core import _core

    with pytest.raises(core.InvalidArgument, match="no table"):
        _core.fastest_put(text, 1, 1, 1)


def test_on_one_host_nobody_waits_for_bundles_by_their_number() -> None:
    channel = core.HostFabric(2).channel(0, [1], core.Layout([core.TensorSpec("float32", (4,))]))
    channel.wait_for(1, 5)
    with pytest.raises(core.InvalidArgument, match="rank 0 does not receive"):
        channel.wait_for(0, 1)
    with pytest.raises(core.InvalidArgument, match="-1 bundles"):
        channel.wait_for(1, -1)
