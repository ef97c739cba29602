"""What processes of a group make of pipelines that call their denoisers several times a step."""

from __future__ import annotations

from typing import Any

import torch
from group import Member
from group_bits import digest
from guided import Both, small
from safetensors.torch import save_model

import asyncdiff
from asyncdiff import InputError

#: Settings of two ranks.
SETTINGS: list[dict[str, Any]] = [
    {"components": 2, "warmup": 99},
    {"components": 2, "warmup": 1},
    {"components": 1, "guidance": "split"},
    {"components": 2, "schedule": "wavefront", "warmup": 2, "exact_tail": 1},
]


def _ends_early(k: int) -> list[int]:
    return [0, 1] if k < 4 else [0]


def _runs(settings: dict[str, Any], **group: Any) -> list[str]:
    """Digests of what a pipeline draws with both denoisers: as ever, with guidance that ends early,
    with weights that were written to, and after a callback that raised."""
    pipe = Both()
    where = {"devices": ["cpu"] * (1 if group else 2), "split": "estimate", "deadline": 30.0}
    found = []

    def raises(k: int) -> None:
        if k == 3:
            raise ValueError("enough")

    with asyncdiff.parallelize(pipe, **where, **settings, **group):
        found.append(digest(pipe()))
        found.append(digest(pipe(order=_ends_early)))
        try:
            pipe(change=raises)
        except ValueError as e:
            assert str(e) == "enough"
        if "checkpoint" not in group:
            for weight in (*pipe.unet.parameters(), *pipe.unet_2.parameters()):
                weight.data.mul_(1.1)
        found.append(digest(pipe()))
    return found


def settings(member: Member) -> list[list[str]]:
    return [_runs(each, group=member.group(f"group{i}")) for i, each in enumerate(SETTINGS)]


def alone(index: int) -> list[str]:
    """What one process draws with some settings."""
    return _runs(SETTINGS[index])


def first(member: Member) -> list[str]:
    """Only process 0 gets noise predictions; the others' latents are noise."""
    return _runs(SETTINGS[1], group=member.group(), results="first")


def checkpoint(member: Member) -> list[str]:
    """Each denoiser has its own, by name."""
    folders = {}
    for name, seed in (("unet", 0), ("unet_2", 1)):
        folders[name] = member.folder / f"{name}-{member.process}.safetensors"
        save_model(small(seed), str(folders[name]))
    group = member.group()
    try:
        asyncdiff.parallelize(Both(), group=group, checkpoint=folders["unet"], devices=["cpu"])
    except InputError as e:
        assert "its own checkpoint" in str(e)
    return _runs(SETTINGS[0], group=group, checkpoint=folders)


def checkpoint_alone() -> list[str]:
    pipe = Both()
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, split="estimate", **SETTINGS[0]):
        whole, early = pipe(), pipe(order=_ends_early)
    torch.testing.assert_close(whole, Both()())
    return [digest(whole), digest(early), digest(whole)]
