"""Channels between GPUs, and between ranks on one: eager, captured, failing."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PLACES, devices_for

import asyncdiff_core as core

WAYS = [(place, transport) for place in PLACES for transport in ("auto", "staged")]
MODES = ("copy", "kernel", "inline")


class World:
    """A fabric, one channel from rank 0, a stream for each rank."""

    def __init__(
        self,
        place: str,
        transport: str,
        tensors: list[torch.Tensor],
        receivers: int = 1,
        slots: int = 2,
        deadline: float = 10.0,
        mode: str = "copy",
    ) -> None:
        self.devices = devices_for(place, receivers + 1)
        self.fabric = core.CudaFabric(self.devices, deadline=deadline, transport=transport)
        self.slots = slots
        self.receivers = list(range(1, receivers + 1))
        specs = [
            core.TensorSpec(str(t.dtype).removeprefix("torch."), t.shape, t.stride())
            for t in tensors
        ]
        self.layout = core.Layout(specs)
        self.channel = self.fabric.channel(
            0, self.receivers, self.layout, slots=slots, name="bundle", mode=mode
        )
        self.streams = [torch.cuda.Stream(d) for d in self.devices]
        self.tensors = [t.to(f"cuda:{self.devices[0]}") for t in tensors]
        torch.cuda.synchronize(self.devices[0])

    def views(self, receiver: int, slot: int) -> list[torch.Tensor]:
        device = f"cuda:{self.devices[receiver]}"
        raw = torch.as_tensor(self.channel.slot(receiver, slot), device=device)
        return [
            raw[o : o + s.nbytes].view(getattr(torch, s.dtype)).as_strided(s.shape, s.strides)
            for s, o in zip(self.layout.specs, self.layout.offsets, strict=True)
        ]

    def put(self, slot: int) -> None:
        self.channel.put(self.tensors, slot, self.streams[0])

    def receive(self, receiver: int, slot: int, into: list[torch.Tensor]) -> None:
        """Get, copy out on the receiver's stream, release."""
        stream = self.streams[receiver]
        self.channel.get(receiver, slot, stream)
        with torch.cuda.device(self.devices[receiver]), torch.cuda.stream(stream):
            for new, view in zip(into, self.views(receiver, slot), strict=True):
                new.copy_(view)
        self.channel.release(receiver, slot, stream)

    def room(self, receiver: int) -> list[torch.Tensor]:
        return [torch.zeros_like(v) for v in self.views(receiver, 0)]

    def synchronize(self) -> None:
        for stream in self.streams:
            stream.synchronize()


def mixed_bundle() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(2, 64, 9, 7).to(torch.float16),
        torch.randn(2, 8, 16, 16).to(torch.bfloat16).to(memory_format=torch.channels_last),
        torch.randn(()),
        torch.empty(0, 3),
        torch.arange(33).to(torch.int8),
        torch.randn(1 << 20),
    ]


@pytest.mark.parametrize(("place", "transport"), WAYS)
@pytest.mark.parametrize("receivers", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_any_tensors_arrive_whole(place: str, transport: str, receivers: int, mode: str) -> None:
    world = World(place, transport, mixed_bundle(), receivers, mode=mode)
    rooms = {r: world.room(r) for r in world.receivers}
    for n in range(5):
        for tensor in world.tensors:
            tensor.copy_(tensor + 1)
        torch.cuda.synchronize(world.devices[0])
        world.put(n % 2)
        for r in world.receivers:
            world.receive(r, n % 2, rooms[r])
        world.synchronize()
        world.fabric.check()
        for room in rooms.values():
            for sent, got in zip(world.tensors, room, strict=True):
                assert torch.equal(sent.cpu(), got.cpu())
    kinds = {world.fabric.links()[0, r] for r in world.receivers}
    assert kinds <= ({"staged"} if transport == "staged" else {"memory", "peer"})


@pytest.mark.parametrize(("place", "transport"), WAYS)
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_replayed_graphs_and_eager_calls_count_alike(
    place: str, transport: str, slots: int, mode: str
) -> None:
    """A seeded mixture over thousands of bundles; each carries its own number."""
    # Large enough for several blocks, and flags, of a put by kernel.
    source = torch.zeros(50_000, dtype=torch.int64)
    world = World(place, transport, [source], slots=slots, mode=mode)
    (source,) = world.tensors
    sender, receiver = world.streams
    wrong = torch.zeros((), dtype=torch.int64, device=f"cuda:{world.devices[1]}")
    count = torch.zeros_like(wrong)

    def send(slot: int) -> None:
        with torch.cuda.device(world.devices[0]), torch.cuda.stream(sender):
            source.add_(1)
            world.put(slot)

    def receive(slot: int) -> None:
        with torch.cuda.device(world.devices[1]), torch.cuda.stream(receiver):
            world.channel.get(1, slot, receiver)
            count.add_(1)
            wrong.add_((world.views(1, slot)[0] != count).sum())
            world.channel.release(1, slot, receiver)

    graphs: dict[tuple[Any, int], torch.cuda.CUDAGraph] = {}
    # Each kernel has to run once before it is captured.
    for slot in range(slots):
        send(slot)
        receive(slot)
    world.synchronize()
    for work, rank in ((send, 0), (receive, 1)):
        for slot in range(slots):
            graph = torch.cuda.CUDAGraph()
            with (
                torch.cuda.device(world.devices[rank]),
                torch.cuda.graph(graph, stream=world.streams[rank]),
            ):
                work(slot)
            graphs[work, slot] = graph
    torch.manual_seed(slots)
    total = 3000
    for n, (a, b) in enumerate((torch.rand(total, 2) < 0.7).tolist()):
        slot = n % slots
        for work, rank, replay in ((send, 0, a), (receive, 1, b)):
            if replay:
                with (
                    torch.cuda.device(world.devices[rank]),
                    torch.cuda.stream(world.streams[rank]),
                ):
                    graphs[work, slot].replay()
            else:
                work(slot)
    world.synchronize()
    world.fabric.check()
    assert count.item() == total + slots
    assert wrong.item() == 0


@pytest.mark.parametrize(("place", "transport"), WAYS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shift", [0, 1, 4, 16])
def test_odd_sizes_and_unaligned_sources(place: str, transport: str, mode: str, shift: int) -> None:
    sizes = [0, 1, 3, 15, 16, 17, 255, 256, 257, 16383, 16384, 16385, 100_003, 1_500_001]
    world = World(place, transport, [torch.zeros(n, dtype=torch.uint8) for n in sizes], mode=mode)
    torch.manual_seed(shift)
    base = torch.randint(256, (2_000_000,), dtype=torch.uint8, device=f"cuda:{world.devices[0]}")
    world.tensors = [base[shift + i * 16 :][:n] for i, n in enumerate(sizes)]
    torch.cuda.synchronize(world.devices[0])
    room = world.room(1)
    for n in range(3):
        world.put(n % 2)
        world.receive(1, n % 2, room)
        world.synchronize()
        world.fabric.check()
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(world.tensors, room, strict=True))
        world.tensors = [t.flip(0) if shift == 0 else t for t in world.tensors]
        torch.cuda.synchronize(world.devices[0])


@pytest.mark.parametrize(("place", "transport"), WAYS)
@pytest.mark.parametrize("mode", MODES)
def test_tensors_may_be_pushed_one_by_one(place: str, transport: str, mode: str) -> None:
    world = World(place, transport, mixed_bundle(), mode=mode)
    room = world.room(1)
    for n in range(5):
        for tensor in world.tensors:
            tensor.copy_(tensor + 1)
        torch.cuda.synchronize(world.devices[0])
        world.channel.begin(n % 2, world.streams[0])
        for i in reversed(range(len(world.tensors))):
            world.channel.push(i, world.tensors[i], n % 2, world.streams[0])
        world.channel.commit(n % 2, world.streams[0])
        world.receive(1, n % 2, room)
        world.synchronize()
        world.fabric.check()
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(world.tensors, room, strict=True))


@pytest.mark.parametrize(("place", "transport"), WAYS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shift", [0, 1, 4])
def test_unpack_is_get_copy_release(place: str, transport: str, mode: str, shift: int) -> None:
    sizes = [0, 1, 7, 8, 9, 255, 256, 4096, 4097, 100_003]
    world = World(place, transport, [torch.zeros(n, dtype=torch.uint8) for n in sizes], mode=mode)
    torch.manual_seed(shift)
    device = f"cuda:{world.devices[1]}"
    base = torch.zeros(300_000, dtype=torch.uint8, device=device)
    into = [base[shift + sum(sizes[:i]) + 16 * i :][:n] for i, n in enumerate(sizes)]
    torch.cuda.synchronize(world.devices[1])
    for n in range(6):
        for tensor in world.tensors:
            tensor.random_(256)
        torch.cuda.synchronize(world.devices[0])
        world.put(n % 2)
        world.channel.unpack(1, into, n % 2, world.streams[1])
        world.synchronize()
        world.fabric.check()
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(world.tensors, into, strict=True))
    written = torch.zeros_like(base, dtype=torch.bool)
    for i, size in enumerate(sizes):
        written[shift + sum(sizes[:i]) + 16 * i :][:size] = True
    assert not base[~written].any()


def test_unpack_after_an_unreleased_get_is_out_of_turn() -> None:
    world = World("one GPU", "auto", [torch.zeros(8)])
    world.put(0)
    world.put(1)
    world.channel.get(1, 0, world.streams[1])
    world.channel.unpack(1, world.room(1), 1, world.streams[1])
    world.synchronize()
    with pytest.raises(core.SlotOrderError):
        world.fabric.check()


def test_tensors_are_found_by_the_exchange_table() -> None:
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch has no DLPack exchange table")
    tensors = [torch.zeros(3, 5), torch.zeros(4, dtype=torch.bfloat16), torch.zeros(2, 3).T]
    world = World(PLACES[0], "auto", tensors)
    found = world.channel._native.addresses
    assert found(world.tensors, True) == [t.data_ptr() for t in world.tensors]
    assert found(tensors, True) is None and found(world.tensors, False) is None
    assert found([t.contiguous() for t in world.tensors], True) is None
    with pytest.raises(core.InvalidArgument, match="lies on the CPU"):
        world.channel.put(tensors, 0)


@pytest.mark.parametrize("place", PLACES)
def test_many_tensors(place: str) -> None:
    specs = [core.TensorSpec("float32", (i + 1,)) for i in range(321)]
    devices = devices_for(place, 2)
    fabric = core.CudaFabric(devices)
    streams = [torch.cuda.Stream(d) for d in devices]
    for mode, count in (("kernel", 320), ("inline", 320), ("copy", 321), ("auto", 321)):
        channel = fabric.channel(0, [1], core.Layout(specs[:count]), mode=mode)
        sent = [torch.full((i + 1,), i + 0.5, device=f"cuda:{devices[0]}") for i in range(count)]
        got = [torch.zeros(i + 1, device=f"cuda:{devices[1]}") for i in range(count)]
        torch.cuda.synchronize(devices[0])
        torch.cuda.synchronize(devices[1])
        channel.put(sent, 0, streams[0])
        channel.unpack(1, got, 0, streams[1])
        streams[1].synchronize()
        fabric.check()
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(sent, got, strict=True))
    for mode in ("kernel", "inline"):
        with pytest.raises(core.InvalidArgument, match="at most 320"):
            fabric.channel(0, [1], core.Layout(specs), mode=mode)


@pytest.mark.parametrize(("place", "transport"), WAYS)
def test_bundles_of_several_channels_go_in_one_launch(place: str, transport: str) -> None:
    """A noise prediction to all and hidden states to one, as stride denoising needs it."""
    devices = devices_for(place, 3)
    fabric = core.CudaFabric(devices, transport=transport)
    small = core.Layout([core.TensorSpec("float16", (2, 4, 8, 8))] * 2)
    large = core.Layout([core.TensorSpec("float16", (2, 320, 32, 32)), *small.specs])
    modes = ("inline", "kernel", "copy")
    channels = [
        fabric.channel(0, [1, 2] if i % 2 else [1], small if i % 2 else large, mode=modes[i % 3])
        for i in range(10)
    ]
    streams = [torch.cuda.Stream(d) for d in devices]
    device = f"cuda:{devices[0]}"
    bundles = [
        [torch.zeros(s.shape, dtype=torch.float16, device=device) for s in c.layout.specs]
        for c in channels
    ]
    for n in range(4):
        for bundle in bundles:
            for tensor in bundle:
                tensor.normal_()
        torch.cuda.synchronize(devices[0])
        fabric.put_together(
            [(c, b, n % 2) for c, b in zip(channels, bundles, strict=True)], streams[0]
        )
        for c, bundle in zip(channels, bundles, strict=True):
            for r in c.receivers:
                into = [
                    torch.zeros(t.shape, dtype=t.dtype, device=f"cuda:{devices[r]}") for t in bundle
                ]
                torch.cuda.synchronize(devices[r])
                c.unpack(r, into, n % 2, streams[r])
                streams[r].synchronize()
                fabric.check()
                assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(bundle, into, strict=True))
    first, second = channels[0], fabric.channel(1, [0], small)
    with pytest.raises(core.InvalidArgument, match="named twice"):
        fabric.put_together([(first, bundles[0], 0)] * 2, streams[0])
    with pytest.raises(core.InvalidArgument, match="different senders"):
        fabric.put_together([(first, bundles[0], 0), (second, bundles[1], 0)], streams[0])
    other = core.CudaFabric(devices).channel(0, [1], small)
    with pytest.raises(core.InvalidArgument, match="another fabric"):
        fabric.put_together([(other, bundles[1], 0)], streams[0])
    host = core.HostFabric(2).channel(0, [1], core.Layout([]))
    with pytest.raises(core.InvalidArgument, match="another fabric"):
        fabric.put_together([(host, [], 0)], streams[0])
    with pytest.raises(core.InvalidArgument, match="null"):
        fabric._native.put_together([(None, [], 0)], 0)


@pytest.mark.parametrize(("place", "transport"), WAYS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("first", [2**32 - 6, 2**64 - 6])
def test_counts_may_wrap(place: str, transport: str, mode: str, first: int) -> None:
    world = World(place, transport, [torch.zeros(1000), torch.zeros(3)], mode=mode)
    room = world.room(1)
    for again in range(2):
        world.fabric.reset(first)
        for n in range(first, first + 12):
            for tensor in world.tensors:
                tensor.fill_(n - first + 100 * again)
            torch.cuda.synchronize(world.devices[0])
            world.put(n % 2)
            if n % 3:
                world.receive(1, n % 2, room)
            else:
                world.channel.unpack(1, room, n % 2, world.streams[1])
            world.synchronize()
            world.fabric.check()
            assert all((t == n - first + 100 * again).all() for t in room)
    world.fabric.reset()
    world.channel.get(1, 0, world.streams[1])  # nothing of before looks like the first bundle
    world.fabric.abort(0, "nothing came")
    world.synchronize()
    with pytest.raises(core.Aborted):
        world.fabric.check()


def test_auto_takes_what_is_measured_to_be_fastest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = core.put_costs(0, 0)
    assert set(costs.kernel_us) == set(costs.copy_us) >= {1024, 1 << 26}
    assert all(0.5 < us < 10_000 for us in costs.kernel_us.values())
    fabric = core.CudaFabric([0, 0])
    for nbytes in (16, 4096, 65536, 1 << 20, 1 << 26):
        layout = core.Layout([core.TensorSpec("uint8", (nbytes,))])
        assert fabric.channel(0, [1], layout).mode == costs.fastest(nbytes)
    with pytest.raises(core.InvalidArgument, match="auto, inline, kernel or copy"):
        fabric.channel(0, [1], layout, mode="magic")
    with pytest.raises(core.DeviceError, match="there are"):
        core.put_costs(0, 99)
    # Kept for other processes, and measured again where the file is no table.
    script = "import asyncdiff_core; print(asyncdiff_core.put_costs(0, 0).text)"
    monkeypatch.setenv("ASYNCDIFF_CACHE", str(tmp_path))
    seen = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-P", "-c", script],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        seen.append(run.stdout)
    assert seen[0] == seen[1]
    (file,) = tmp_path.iterdir()
    assert file.read_text().strip() == seen[0].strip()
    file.write_text("asyncdiff put costs 3\n1 1\n5 0 0 0\n")
    run = subprocess.run(
        [sys.executable, "-P", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert len(run.stdout.splitlines()) == len(seen[0].splitlines())
    assert file.read_text().strip() == run.stdout.strip()


@pytest.mark.parametrize("mode", ["kernel", "inline"])
def test_a_fused_put_waits_and_gives_up_like_the_other(mode: str) -> None:
    world = World("one GPU", "auto", [torch.zeros(1 << 20)], deadline=0.3, mode=mode)
    for n in range(3):
        world.put(n % 2)
    world.synchronize()
    with pytest.raises(core.ExchangeTimeout, match="begin of slot 0") as caught:
        world.fabric.check()
    assert (caught.value.rank, caught.value.peer) == (0, 1)
    world.fabric.reset()
    world.put(1)
    world.synchronize()
    with pytest.raises(core.SlotOrderError, match="slot 0 is next"):
        world.fabric.check()
    world.fabric.reset()
    room = world.room(1)
    world.tensors[0].fill_(3)
    torch.cuda.synchronize()
    world.put(0)
    world.receive(1, 0, room)
    world.synchronize()
    world.fabric.check()
    assert (room[0] == 3).all()


@pytest.mark.parametrize("place", PLACES)
def test_the_current_device_stays(place: str) -> None:
    world = World(place, "auto", [torch.zeros(8)])
    torch.cuda.set_device(0)
    world.put(0)
    world.receive(1, 0, world.room(1))
    assert torch.cuda.current_device() == 0
    assert torch.zeros(1, device="cuda").device.index == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", PLACES)
def test_what_is_dropped_in_the_middle_harms_nobody(place: str, mode: str) -> None:
    """A device may be about to write to another one's memory when its owner is gone."""
    for _ in range(3):
        world = World(place, "auto", [torch.zeros(1 << 20)], mode=mode)
        for n in range(2):
            world.put(n)
            world.receive(1, n, world.room(1))
        world.channel = world.fabric.channel(0, [1], world.layout, mode=mode)
        world.put(0)
        world.receive(1, 0, world.room(1))
        del world  # neither closed nor waited for
    world = World(place, "auto", [torch.full((1 << 20,), 5.0)], mode=mode)
    room = world.room(1)
    world.put(0)
    world.receive(1, 0, room)
    world.synchronize()
    world.fabric.check()
    assert (room[0] == 5).all()
    world.fabric.close()


@pytest.mark.parametrize(("place", "transport"), WAYS)
def test_channels_come_and_go_without_end(place: str, transport: str) -> None:
    """Each takes more than 16 of the fabric's 16384 lines, which the next ones are given."""
    world = World(place, transport, [torch.zeros(50_000)], mode="kernel")
    (tensor,) = world.tensors
    room = world.room(1)
    first = world.channel

    def check(channel: core.Channel, slot: int, value: float) -> None:
        tensor.fill_(value)
        torch.cuda.synchronize(world.devices[0])
        channel.put(world.tensors, slot, world.streams[0])
        channel.unpack(1, room, slot, world.streams[1])
        world.synchronize()
        world.fabric.check()
        assert (room[0] == value).all()

    uses = 0
    for n in range(1500):
        # One that was used, with counts and flags that are not to be found in the next one's lines.
        world.channel = world.fabric.channel(0, [1], world.layout, mode=("kernel", "copy")[n % 2])
        if n % 100 > 1:
            continue
        for slot in (0, 1, 0):
            check(world.channel, slot, n + slot + 0.5)
        check(first, uses % 2, n + 0.25)
        uses += 1
    world.fabric.close()


def test_the_failure_of_a_dropped_channel_is_told() -> None:
    world = World("one GPU", "auto", [torch.zeros(8)], deadline=0.3)
    world.channel.get(1, 0, world.streams[1])
    world.synchronize()
    for _ in range(2):
        world.channel = world.fabric.channel(0, [1], world.layout, name="another")
    with pytest.raises(core.ExchangeTimeout, match="channel 'bundle', get of slot 0"):
        world.fabric.check()
    world.fabric.reset(1)
    # At zero, though the lines of those that are gone were set to one.
    world.channel = world.fabric.channel(0, [1], world.layout)
    room = world.room(1)
    world.tensors[0].fill_(3)
    torch.cuda.synchronize()
    world.put(0)
    world.receive(1, 0, room)
    world.synchronize()
    world.fabric.check()
    assert (room[0] == 3).all()


def test_dropping_breaks_no_capture() -> None:
    """Neither in the thread that captures, where garbage is collected too, nor in another one."""
    worlds = [World("one GPU", "auto", [torch.zeros(8)]) for _ in range(2)]
    value = torch.zeros(1, device="cuda")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        value.add_(1)
        other = threading.Thread(target=worlds.pop)
        other.start()
        other.join()
        worlds.clear()
        value.add_(1)
    graph.replay()
    torch.cuda.synchronize()
    assert value.item() == 2
    World("one GPU", "auto", [torch.zeros(8)]).fabric.close()  # frees what was dropped


@pytest.mark.parametrize(("place", "transport"), WAYS)
@pytest.mark.parametrize("mode", ["kernel", "inline"])
def test_a_missing_bundle_is_a_timeout_with_names(place: str, transport: str, mode: str) -> None:
    world = World(place, transport, [torch.zeros(8)], deadline=0.3, mode=mode)
    begun = time.monotonic()
    world.channel.get(1, 0, world.streams[1])
    world.synchronize()
    assert 0.25 < time.monotonic() - begun < 5
    with pytest.raises(core.ExchangeTimeout, match="rank 1, channel 'bundle', get of slot 0") as e:
        world.fabric.check()
    error = e.value
    assert (error.rank, error.peer, error.slot, error.operation) == (1, 0, 0, "get")
    assert (error.expected, error.seen) == (1, 0)
    # Everything after it returns at once, and a reset makes it all good again.
    begun = time.monotonic()
    for n in range(1, 20):
        world.channel.get(1, n % 2, world.streams[1])
    world.synchronize()
    assert time.monotonic() - begun < 0.25
    world.fabric.reset()
    world.fabric.check()
    room = world.room(1)
    world.put(0)
    world.receive(1, 0, room)
    world.synchronize()
    world.fabric.check()


def test_a_slow_receiver_is_a_timeout_of_the_sender() -> None:
    world = World("one GPU", "auto", [torch.zeros(8)], deadline=0.3)
    for n in range(3):
        world.put(n % 2)
    world.synchronize()
    with pytest.raises(core.ExchangeTimeout, match="begin of slot 0") as caught:
        world.fabric.check()
    assert (caught.value.rank, caught.value.peer) == (0, 1)
    assert (caught.value.expected, caught.value.seen) == (1, 0)


def test_an_abort_ends_waits() -> None:
    world = World("one GPU", "auto", [torch.zeros(8)], deadline=60)
    world.channel.get(1, 0, world.streams[1])
    threading.Timer(0.2, world.fabric.abort, (0, "enough")).start()
    begun = time.monotonic()
    world.synchronize()
    assert time.monotonic() - begun < 10
    with pytest.raises(core.Aborted, match="rank 0 aborted the exchange: enough"):
        world.fabric.check()
    world.fabric.reset()
    world.fabric.abort(0, "x" + "é" * 300)  # what there is room for ends inside a character
    with pytest.raises(core.Aborted, match=r"exchange: xé{250,251}$"):
        world.fabric.check()


@pytest.mark.parametrize("case", ["begin", "commit", "get", "release"])
@pytest.mark.parametrize("mode", ["kernel", "inline"])
def test_slots_out_of_turn(case: str, mode: str) -> None:
    world = World("one GPU", "auto", [torch.zeros(8)], deadline=5, mode=mode)
    stream = world.streams[0]
    if case == "begin":
        world.channel.begin(1, stream)
    elif case == "commit":
        world.channel.commit(0, stream)
    elif case == "get":
        world.channel.get(1, 1, stream)
    else:
        world.channel.release(1, 0, stream)
    world.synchronize()
    with pytest.raises(core.SlotOrderError, match="n-th bundle uses slot") as caught:
        world.fabric.check()
    assert caught.value.operation == case


def test_mistakes_on_the_host_are_refused() -> None:
    world = World("one GPU", "auto", [torch.zeros(8)])
    with pytest.raises(core.InvalidArgument, match="lies on the CPU"):
        world.channel.put([torch.zeros(8)], 0, world.streams[0])
    with pytest.raises(core.InvalidArgument, match="float64"):
        world.channel.put([torch.zeros(8, device="cuda").double()], 0, world.streams[0])
    count = torch.cuda.device_count()
    with pytest.raises(core.DeviceError, match=f"CUDA device {count} does not exist"):
        core.CudaFabric([0, count])
    with pytest.raises(core.InvalidArgument, match="choose auto, peer or staged"):
        core.CudaFabric([0], transport="carrier pigeon")
    huge = core.Layout([core.TensorSpec("uint8", (1 << 42,))])
    with pytest.raises(core.CudaError, match="allocating"):
        world.fabric.channel(0, [1], huge)
    assert world.fabric.channel(0, [1], world.layout).slots == 2


def test_mailboxes_outlive_their_fabric() -> None:
    world = World("one GPU", "auto", [torch.ones(8)])
    world.put(0)
    world.synchronize()
    (view,) = world.views(1, 0)
    world.fabric.close()
    world.fabric.close()
    with pytest.raises(core.CoreError, match="closed"):
        world.put(1)
    del world
    assert view.sum().item() == 8


def test_cupy_arrays_and_streams() -> None:
    cupy = pytest.importorskip("cupy")
    fabric = core.CudaFabric([0, 0])
    channel = fabric.channel(0, [1], core.Layout([core.TensorSpec("float32", (4,))]))
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        channel.put([cupy.arange(4, dtype=cupy.float32)], 0, stream)
        channel.get(1, 0, stream)
        got = cupy.asarray(channel.slot(1, 0))[:16].view(cupy.float32).get()
    assert got.tolist() == [0, 1, 2, 3]
