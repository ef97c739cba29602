"""Channels between GPUs, and between ranks on one: eager and captured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PLACES, devices_for
from core_world import MODES, WAYS, World, mixed_bundle, receive

import asyncdiff_core as core


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
    torch.cuda.synchronize(world.devices[1])  # made in another stream than it is counted in

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
@pytest.mark.parametrize("pushed", [False, True])
def test_odd_sizes_and_unaligned_sources(
    place: str, transport: str, mode: str, shift: int, pushed: bool
) -> None:
    sizes = [0, 1, 3, 15, 16, 17, 255, 256, 257, 16383, 16384, 16385, 100_003, 1_500_001]
    world = World(place, transport, [torch.zeros(n, dtype=torch.uint8) for n in sizes], mode=mode)
    torch.manual_seed(shift)
    base = torch.randint(256, (2_000_000,), dtype=torch.uint8, device=f"cuda:{world.devices[0]}")
    world.tensors = [base[shift + i * 16 :][:n] for i, n in enumerate(sizes)]
    torch.cuda.synchronize(world.devices[0])
    room = world.room(1)
    for n in range(3):
        (world.push if pushed else world.put)(n % 2)
        world.receive(1, n % 2, room)
        world.synchronize()
        world.fabric.check()
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(world.tensors, room, strict=True))
        world.tensors = [t.flip(0) if shift == 0 else t for t in world.tensors]
        torch.cuda.synchronize(world.devices[0])


@pytest.mark.parametrize(("place", "transport"), WAYS)
@pytest.mark.parametrize("receivers", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_tensors_may_be_pushed_one_by_one(
    place: str, transport: str, mode: str, receivers: int
) -> None:
    world = World(place, transport, mixed_bundle(), receivers, mode=mode)
    rooms = {r: world.room(r) for r in world.receivers}
    for n in range(5):
        for tensor in world.tensors:
            tensor.copy_(tensor + 1)
        torch.cuda.synchronize(world.devices[0])
        world.push(n % 2)
        for r, room in rooms.items():
            world.receive(r, n % 2, room)
        world.synchronize()
        world.fabric.check()
        for room in rooms.values():
            for sent, got in zip(world.tensors, room, strict=True):
                assert torch.equal(sent.cpu(), got.cpu())


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
        receive(channel, 1, 0, streams[1], got)
        streams[1].synchronize()
        fabric.check()
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(sent, got, strict=True))
    for mode in ("kernel", "inline"):
        with pytest.raises(core.InvalidArgument, match="at most 320"):
            fabric.channel(0, [1], core.Layout(specs), mode=mode)


@pytest.mark.parametrize(("place", "transport"), WAYS)
def test_a_batch_of_several_channels_goes_in_one_launch(place: str, transport: str) -> None:
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
        fabric.put_batch(
            [(c, b, n % 2) for c, b in zip(channels, bundles, strict=True)], streams[0]
        )
        for c, bundle in zip(channels, bundles, strict=True):
            for r in c.receivers:
                into = [
                    torch.zeros(t.shape, dtype=t.dtype, device=f"cuda:{devices[r]}") for t in bundle
                ]
                torch.cuda.synchronize(devices[r])
                receive(c, r, n % 2, streams[r], into)
                streams[r].synchronize()
                fabric.check()
                assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(bundle, into, strict=True))
    first, second = channels[0], fabric.channel(1, [0], small)
    with pytest.raises(core.InvalidArgument, match="named twice"):
        fabric.put_batch([(first, bundles[0], 0)] * 2, streams[0])
    with pytest.raises(core.InvalidArgument, match="different senders"):
        fabric.put_batch([(first, bundles[0], 0), (second, bundles[1], 0)], streams[0])
    other = core.CudaFabric(devices).channel(0, [1], small)
    with pytest.raises(core.InvalidArgument, match="another fabric"):
        fabric.put_batch([(other, bundles[1], 0)], streams[0])
    host = core.HostFabric(2).channel(0, [1], core.Layout([]))
    with pytest.raises(core.InvalidArgument, match="another fabric"):
        fabric.put_batch([(host, [], 0)], streams[0])
    with pytest.raises(core.InvalidArgument, match="null"):
        fabric._native.put_batch([(None, [], 0)], 0)


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
            world.receive(1, n % 2, room)
            world.synchronize()
            world.fabric.check()
            assert all((t == n - first + 100 * again).all() for t in room)
    world.fabric.reset()
    world.channel.get(1, 0, world.streams[1])  # nothing of before looks like the first bundle
    world.fabric.abort(0, "nothing came")
    world.synchronize()
    with pytest.raises(core.Aborted):
        world.fabric.check()


@pytest.mark.alone
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
