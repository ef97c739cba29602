"""What processes of a group compute, and whether one process computes the same bits."""

from __future__ import annotations

import hashlib
from typing import Any

import reference
import torch
from diffusers import DDIMScheduler
from families import FAMILIES
from group import Member
from tiny_pipelines import draw, tiny_flux, tiny_sd
from toys import toy, toy_call

import asyncdiff
from asyncdiff import AsyncDenoiser

CIRCLE = [["down.1", "down.2", "mix"], ["enter", "down.0", "up", "leave"]]
THREE = [["enter", "down.0"], ["down.1", "down.2", "mix"], ["up", "leave"]]
#: The cut is the same whenever it is made.
ESTIMATE = {"split": "estimate"}
#: Settings by how many ranks they have.
SETTINGS: dict[int, list[dict[str, Any]]] = {
    2: [
        {"components": 2, "warmup": 2, **ESTIMATE},
        {"components": 2, "split": CIRCLE},
        {"components": 1, "stride": 2},
        {"components": 1, "guidance": "split"},
        {"components": 2, **ESTIMATE, "schedule": "pipeline"},
        {"components": 2, "schedule": "wavefront", "warmup": 2, "exact_tail": 2, **ESTIMATE},
    ],
    3: [
        {"components": 3, "split": THREE, "warmup": "auto"},
        {"components": 2, **ESTIMATE, "stride": 2, "time_shift": True},
        {"components": 3, "split": THREE, "schedule": "wavefront", "stride": 2, "warmup": 2},
    ],
    4: [
        {"components": 4, "split": "estimate", "extrapolate": 0.5},
        {"components": 2, "guidance": "split", "exact_mode": "split", "warmup": 3, **ESTIMATE},
        {"components": 2, **ESTIMATE, "stride": 3},
    ],
}


def digest(value: torch.Tensor) -> str:
    return hashlib.sha1(value.contiguous().numpy().tobytes()).hexdigest()


def generate(denoiser: AsyncDenoiser, seed: int = 1, steps: int = 8) -> str:
    call = toy_call(batch=4, seed=seed)
    call["sample"] = call["sample"][:2]
    out = denoiser.generate(
        call["sample"],
        {"encoder_hidden_states": call["encoder_hidden_states"]},
        DDIMScheduler(),
        num_inference_steps=steps,
        guidance_scale=2.0,
    )
    return digest(out)


def _three(denoiser: AsyncDenoiser) -> list[str]:
    """Digests of three generations, of which the first two are alike."""
    found = [generate(denoiser), generate(denoiser), generate(denoiser, seed=2, steps=5)]
    denoiser.close()
    return found


def _cases(processes: int) -> list[tuple[dict[str, Any], int]]:
    """Settings, and how many ranks the last process has; the others have one each."""
    more = SETTINGS.get(processes + 1, [])
    return [*((s, 1) for s in SETTINGS[processes]), *((s, 2) for s in more[:1])]


def settings_alone(processes: int) -> list[list[str]]:
    """What :func:`settings` returns, by one process."""
    found = []
    for settings, last in _cases(processes):
        devices = ["cpu"] * (processes - 1 + last)
        found.append(_three(AsyncDenoiser(toy(), devices=devices, **settings)))
    return found


def settings(member: Member) -> list[list[str]]:
    """Digests of toys, by settings."""
    group = member.group()
    found = []
    for settings, last in _cases(member.processes):
        own = last if member.process == member.processes - 1 else 1
        devices = None if last == 1 else ["cpu"] * own
        found.append(
            _three(AsyncDenoiser(toy(), group=group, devices=devices, deadline=20, **settings))
        )
    return found


def _specs(processes: int) -> list[Any]:
    """The reference cases with so many ranks."""
    return [c for c in reference.CASES if c["components"] + c["stride"] - 1 == processes]


def _reference(spec: Any, **where: Any) -> list[str]:
    pipe = reference.pipeline(spec)
    with asyncdiff.parallelize(pipe, **where, **reference.settings(spec)):
        found = [reference.run(pipe, spec) for _ in range(2)]
    assert reference.distance(found[0], reference.expected()[spec["name"]]) < 1e-4
    return [digest(f) for f in found]


def references_alone(processes: int) -> list[list[str]]:
    """What :func:`references` returns, by one process."""
    return [_reference(spec, devices=["cpu"] * processes) for spec in _specs(processes)]


def references(member: Member) -> list[list[str]]:
    """Digests of the reference cases that have so many ranks."""
    group = member.group()
    return [_reference(spec, group=group, deadline=30) for spec in _specs(member.processes)]


def _qualities(**where: Any) -> list[str]:
    pipe, call = tiny_sd()
    with asyncdiff.parallelize(pipe, quality="balanced", split="estimate", **where) as handle:
        found = [digest(draw(pipe, call, num_inference_steps=steps)) for steps in (4, 12)]
        return [*found, handle.settings]


def qualities_alone(processes: int) -> list[str]:
    """What :func:`qualities` returns, by one process."""
    return _qualities(devices=["cpu"] * processes)


def qualities(member: Member) -> list[str]:
    """Digests of pipelines whose settings are picked, and what was picked."""
    return _qualities(group=member.group(), deadline=30)


def _tokens(ranks: int, **where: Any) -> list[str]:
    found = []
    ways: list[dict[str, Any]] = [
        {"schedule": "sequence"},
        {"warmup": 3, "exact_mode": "sequence", **ESTIMATE},
    ]
    for way in ways:
        pipe, call = tiny_flux()
        with asyncdiff.parallelize(pipe, components=ranks, **way, **where):
            found += [digest(draw(pipe, call, num_inference_steps=5)) for _ in range(2)]
    return found


def tokens_alone(processes: int) -> list[str]:
    """What :func:`tokens` returns, by one process."""
    return _tokens(processes, devices=["cpu"] * processes)


def tokens(member: Member) -> list[str]:
    """Digests of pipelines whose processes share out the tokens of steps."""
    return _tokens(member.processes, group=member.group(), deadline=30)


def _limited(**where: Any) -> list[str]:
    pipe, call = FAMILIES["FLUX"]()
    given: dict[str, Any] = {"quality": "exact", "memory": ["1GiB", "700KiB"], **ESTIMATE}
    with asyncdiff.parallelize(pipe, **given, **where) as handle:
        found = [digest(draw(pipe, call, num_inference_steps=2)) for _ in range(2)]
        return [*found, handle.settings]


def limited_alone(processes: int) -> list[str]:
    """What :func:`limited` returns, by one process."""
    return _limited(devices=["cpu"] * processes)


def limited(member: Member) -> list[str]:
    """Digests of a pipeline whose second process has no room for the whole denoiser, as cutting
    finds out, and what is picked then."""
    return _limited(group=member.group(), deadline=30)


def _calibrated(**where: Any) -> list[str]:
    settings = {"schedule": "wavefront", **ESTIMATE, **where}
    denoiser = AsyncDenoiser(toy(), components=2, **settings)
    call = toy_call(batch=8)
    found = denoiser.calibrate(
        call["sample"],
        {"encoder_hidden_states": call["encoder_hidden_states"]},
        DDIMScheduler(clip_sample=False),
        num_inference_steps=6,
    )
    assert found.taken and denoiser.config.order == found
    drawn = denoiser.generate(
        call["sample"],
        {"encoder_hidden_states": call["encoder_hidden_states"]},
        DDIMScheduler(clip_sample=False),
        num_inference_steps=6,
    )
    denoiser.close()
    return [found.fingerprint(), digest(drawn)]


def calibrated_alone() -> list[str]:
    """What :func:`calibrated` returns, by one process."""
    return _calibrated(devices=["cpu"] * 2)


def calibrated(member: Member) -> list[str]:
    """A calibration, and what is drawn with it. The option: who gets noise predictions."""
    return _calibrated(group=member.group(), results=member.option, deadline=30)


def first(member: Member) -> list[list[str]]:
    """Digests of what process 0 draws, where it alone gets noise predictions."""
    group, found = member.group(), []
    for settings, _ in _cases(member.processes)[: len(SETTINGS[member.processes])]:
        denoiser = AsyncDenoiser(toy(), group=group, results="first", deadline=20, **settings)
        found.append(_three(denoiser))
    return found
