"""What processes of a group compute on GPUs, and what the others are told when one ends."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import reference
import sequence
import torch
from families import FAMILIES
from group import Member
from group_bits import CIRCLE, digest
from group_failures import SPLIT, THREE, loop, told
from toys import toy, toy_call

import asyncdiff
from asyncdiff import AsyncDenoiser


def _exact() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


def _device(member: Member) -> str:
    shared = member.option == "one GPU"
    index = 0 if shared else member.process % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return f"cuda:{index}"


def _toys(home: str, ranks: int, **where: Any) -> list[str]:
    """Digests of toys, in settings with so many ranks."""
    found = []
    settings: dict[int, list[dict[str, Any]]] = {
        2: [
            {"components": 2, "split": SPLIT},
            {"components": 2, "split": CIRCLE},
            {"components": 1, "stride": 2},
        ],
        3: [
            {"components": 3, "split": THREE},
            {"components": 2, "stride": 2, "split": SPLIT},
        ],
    }
    call = {
        k: v.to(home, torch.float32 if v.is_floating_point() else v.dtype)
        for k, v in toy_call().items()
    }
    for chosen in settings[ranks]:
        module = toy().to(home, torch.float32)
        denoiser = AsyncDenoiser(module, **where, **chosen)
        times = torch.tensor([900 - 100 * k for k in range(6)], device=home)
        found += [loop(denoiser, call, times) for _ in range(2)]
        denoiser.close()
    return found


def alone(place: str, ranks: int) -> list[Any]:
    """What :func:`bits` returns, by one process."""
    _exact()
    count = torch.cuda.device_count()
    devices = [f"cuda:{0 if place == 'one GPU' else r % count}" for r in range(ranks)]
    return [_toys("cuda:0", ranks, devices=devices), _references(ranks, "cuda:0", devices=devices)]


def bits(member: Member) -> list[Any]:
    """Digests of toys and of reference cases."""
    _exact()
    home = _device(member)
    where = {"group": member.group(), "devices": [home], "deadline": 60}
    return [
        _toys(home, member.processes, **where),
        _references(member.processes, home, **where),
    ]


def bits_between_hosts(member: Member) -> list[Any]:
    """The same where each process counts as one on a host of its own."""
    _over_nccl(member)
    return bits(member)


def tokens_between_hosts(member: Member) -> str:
    """A digest of what ranks on hosts of their own compute that share out tokens."""
    _over_nccl(member)
    home = _device(member)
    return _tokens(home, group=member.group(), devices=[home], deadline=60)


def tokens_alone(place: str) -> str:
    """What that returns, by one process."""
    devices = ["cuda:0", "cuda:0" if place == "one GPU" else "cuda:1"]
    return _tokens("cuda:0", devices=devices)


def _over_nccl(member: Member) -> None:
    os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    if member.option == "one GPU":  # which NCCL refuses processes of one host
        os.environ["NCCL_HOSTID"] = f"host {member.process}"


def _tokens(home: str, **where: Any) -> str:
    _exact()
    _, call, _ = sequence.of_family("SD3")
    module = FAMILIES["SD3"]()[0].transformer.to(home, torch.float32)
    given = call.kwargs([t.to(home) for t in call.tensors])
    made = AsyncDenoiser(module, schedule="sequence", components=2, split="estimate", **where)
    with contextlib.closing(made) as denoiser:
        time = given["timestep"].flatten()[:1].cpu()
        found = []
        for _ in range(2):
            with denoiser.generation(time.expand(3)):
                found += [digest(denoiser(**given)[0].cpu()) for _ in range(3)]
    return " ".join(found)


def _references(ranks: int, home: str, **where: Any) -> list[str]:
    found = []
    for spec in reference.CASES:
        if spec["components"] + spec["stride"] - 1 == ranks:
            pipe = reference.pipeline(spec, home)
            with asyncdiff.parallelize(pipe, **where, **reference.settings(spec)):
                out = [reference.run(pipe, spec) for _ in range(2)]
            assert reference.distance(out[0], reference.expected()[spec["name"]]) < 1e-3
            found += [digest(x.cpu()) for x in out]
    return found


def killed(member: Member) -> Any:
    """Process 1 is killed in the middle of a generation; what the others are told."""
    home = _device(member)
    group = member.group()
    module = toy().to(home, torch.float32)
    denoiser = AsyncDenoiser(
        module, group=group, devices=[home], components=3, split=THREE, deadline=3
    )
    call = {
        k: v.to(home, torch.float32 if v.is_floating_point() else v.dtype)
        for k, v in toy_call().items()
    }
    times = torch.tensor([900 - 100 * k for k in range(6)], device=home)
    loop(denoiser, call, times)

    def die(step: int) -> None:
        if step == 3 and member.process == 1:
            torch.cuda.synchronize()
            member.die()

    found = told(lambda: loop(denoiser, call, times, die))
    denoiser.close()
    left = [0, 2]
    again = member.group("again", left)
    module = toy().to(home, torch.float32)
    denoiser = AsyncDenoiser(module, group=again, devices=[home], split=SPLIT, deadline=60)
    found["again"] = loop(denoiser, call, times)
    denoiser.close()
    return found
