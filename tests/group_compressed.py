"""What processes of a group draw where bundles cross compressed, and one process does."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from diffusers import DDIMScheduler
from group import Member
from group_bits import ESTIMATE, THREE, digest
from toys import Toy, toy_call

from asyncdiff import AsyncDenoiser
from asyncdiff.partition.links import Links
from asyncdiff.runtime.cutting.cutter import Cutter

#: An estimated cut would be another one where links are measured, as "auto" wants them.
TWO = [["enter", "down"], ["mix", "up", "leave"]]
#: By how many ranks they have.
SETTINGS: dict[int, list[dict[str, Any]]] = {
    2: [
        {"components": 2, "warmup": 2, "compress": "fp8", "split": TWO},
        {"components": 2, "warmup": 2, "compress": "auto", "split": TWO},
        {
            "components": 2, "schedule": "wavefront", "warmup": 2, "exact_tail": 1,
            "compress": "int8", **ESTIMATE,
        },
    ],
    3: [
        {"components": 2, "stride": 2, "warmup": 2, "compress": "int8", **ESTIMATE},
        {
            "components": 3, "split": THREE, "schedule": "wavefront", "warmup": 2,
            "compress": "fp8",
        },
    ],
}  # fmt: skip


def _drawn(**settings: Any) -> list[str]:
    """Digests of two generations."""
    torch.manual_seed(0)
    module = Toy().eval().requires_grad_(False)
    denoiser = AsyncDenoiser(module, **settings)
    # Bytes a millisecond of links: so slow that "auto" compresses.
    with patch.object(Cutter, "links", lambda self: Links.alike(100.0)):
        return _generations(denoiser)


def _generations(denoiser: AsyncDenoiser) -> list[str]:
    call = {k: v.float() for k, v in toy_call(batch=4, size=16).items()}
    found = []
    for steps in (8, 6):
        out = denoiser.generate(
            call["sample"][:2],
            {"encoder_hidden_states": call["encoder_hidden_states"]},
            DDIMScheduler(),
            num_inference_steps=steps,
            guidance_scale=2.0,
        )
        found.append(digest(out))
    denoiser.close()
    return found


def alone(processes: int) -> list[list[str]]:
    """What :func:`drawn` returns, by one process."""
    return [_drawn(devices=["cpu"] * processes, **s) for s in SETTINGS[processes]]


def drawn(member: Member) -> list[list[str]]:
    """Digests, by settings; ``option``: who gets results."""
    group, results = member.group(), member.option
    return [
        _drawn(group=group, deadline=20, results=results, **s) for s in SETTINGS[member.processes]
    ]
