"""What processes of a group are told where they differ, or where one of them is gone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from group import Member
from group_bits import digest
from toys import Toy, toy, toy_call

from asyncdiff import AsyncDenoiser
from asyncdiff.errors import AsyncDiffError
from asyncdiff.runtime.worker import Worker

TIMES = torch.tensor([900 - 100 * k for k in range(6)])
SPLIT = [["enter", "down"], ["mix", "up", "leave"]]
THREE = [["enter", "down.0"], ["down.1", "down.2", "mix"], ["up", "leave"]]


def loop(
    denoiser: AsyncDenoiser,
    call: dict[str, Any],
    times: torch.Tensor = TIMES,
    at: Callable[[int], None] = lambda step: None,
) -> str:
    latents = call["sample"]
    with denoiser.generation(times):
        for k, t in enumerate(times):
            at(k)
            (noise,) = denoiser(latents, t, call["encoder_hidden_states"])
            latents = latents - 0.1 * noise
    return digest(latents.cpu())


def told(work: Callable[[], Any]) -> dict[str, Any]:
    """What a call raises, and after how many seconds."""
    begun = time.monotonic()
    try:
        work()
    except AsyncDiffError as e:
        return {
            "kind": type(e).__name__,
            "rank": getattr(e, "rank", None),
            "what": getattr(e, "what", None),
            "text": str(e),
            "seconds": time.monotonic() - begun,
        }
    return {"kind": "none", "seconds": time.monotonic() - begun}


def alone() -> str:
    """What two ranks draw, in one process."""
    return loop(AsyncDenoiser(toy(), devices=["cpu"] * 2, split=SPLIT), toy_call())


def differences(member: Member) -> dict[str, Any]:
    group, one = member.group(), member.process == 1
    out: dict[str, Any] = {}

    def make(module: Any = None, **settings: Any) -> AsyncDenoiser:
        defaults = {"split": SPLIT, "group": group, "deadline": 20}
        return AsyncDenoiser(module or toy(), **(defaults | settings))

    out["settings"] = told(lambda: make(warmup=2 if one else 1))
    out["weights"] = told(lambda: make(toy(seed=member.process)))
    other = Toy(depth=4 if one else 3).double().eval().requires_grad_(False)
    out["model"] = told(lambda: make(other))
    out["ranks"] = told(lambda: make(components=3, split=THREE))
    denoiser = make()
    call, small = toy_call(), toy_call(batch=1)
    out["sample"] = told(lambda: loop(denoiser, toy_call(seed=5 + member.process)))
    text = call | {"encoder_hidden_states": call["encoder_hidden_states"] + member.process}
    out["text"] = told(lambda: loop(denoiser, text))
    out["shape"] = told(lambda: loop(denoiser, small if one else call))
    out["times"] = told(lambda: loop(denoiser, call, TIMES[: 6 - member.process]))
    denoiser.configure(warmup=1 + member.process)
    out["configured"] = told(lambda: loop(denoiser, call))
    denoiser.configure(warmup=1)
    hook = denoiser.module.mix.register_forward_hook(lambda *_: None) if one else None
    out["hooks"] = told(lambda: loop(denoiser, call))
    if hook is not None:
        hook.remove()
    prepare = lambda: denoiser.prepare(**call)  # noqa: E731
    out["calls"] = told(prepare if one else lambda: loop(denoiser, call))
    out["bits"] = loop(denoiser, call)
    denoiser.close()
    out["closed"] = told(lambda: loop(denoiser, call))
    return out


#: Which process goes, by when.
GONE = {"coming": 1, "making": 0, "preparing": 2, "in": 1, "first": 0, "between": 2, "late": 1}
DEADLINE = 1.0


def gone(member: Member) -> Any:
    """One of three processes ends; what the others are told, and what they can do then."""
    moment, mine = member.option, GONE[member.option] == member.process
    whole, call = member.group(), toy_call()
    made: list[AsyncDenoiser] = []

    def die(*_: Any, **__: Any) -> None:
        if mine:
            member.die()

    def make() -> None:
        if moment == "coming":
            die()
        if moment == "making" and mine:
            AsyncDenoiser._given = die  # type: ignore[method-assign]
        if moment == "preparing" and mine:
            Worker.warm_up = die  # type: ignore[method-assign]
        made.append(AsyncDenoiser(toy(), group=whole, components=3, split=THREE, deadline=DEADLINE))

    def work() -> None:
        make()
        loop(made[0], call, at=lambda k: die() if k == {"in": 3, "first": 1}.get(moment) else None)
        if moment == "between":
            die()
        if moment == "late":
            # A process that lives and makes no call.
            if mine:
                time.sleep(2 * DEADLINE)
            else:
                loop(made[0], call)
                return
        loop(made[0], call)

    found = told(work)
    for denoiser in made:
        denoiser.close()
    if moment == "late" and mine:
        return found
    left = [p for p in range(member.processes) if p != GONE[moment]]
    again = AsyncDenoiser(toy(), group=member.group("again", left), split=SPLIT, deadline=20)
    found["again"] = loop(again, call)
    again.close()
    return found
