"""What processes of a group are told where they differ, or where one of them is gone."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from group import Member
from group_bits import digest
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from toys import Toy, attention, attention_call, toy, toy_call

from asyncdiff import AsyncDenoiser, spread
from asyncdiff.errors import AsyncDiffError, CaptureError, InputError
from asyncdiff.processes.team import Team
from asyncdiff.progress import heartbeat
from asyncdiff.runtime.cutting import cutter
from asyncdiff.runtime.exchange.meetings import Meetings
from asyncdiff.runtime.worker import Worker
from asyncdiff.sampling.calibration import Calibration, Shape

TIMES = torch.tensor([900 - 100 * k for k in range(6)])
SPLIT = [["enter", "down"], ["mix", "up", "leave"]]
THREE = [["enter", "down.0"], ["down.1", "down.2", "mix"], ["up", "leave"]]

FOUR = [["enter", "down.0"], ["down.1", "down.2"], ["mix", "up.0"], ["up.1", "up.2", "leave"]]


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
    shape = Shape(2, 1, 1, 1, 0)
    found = Calibration(shape, (1.0,), (0.0,), (0,), ((0.1 * member.process,),))
    out["calibration"] = told(lambda: make(schedule="wavefront", order=found))
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
    # Another denoiser of the same group, on its own.
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "ranks"))
    out["mesh"] = told(lambda: make(group=mesh))
    beside = make(group=mesh["ranks"])
    out["beside"] = [loop(beside, call), loop(denoiser, call)]
    beside.close()
    denoiser.close()
    out["closed"] = told(lambda: loop(denoiser, call))
    return out


#: Which process goes, by when.
GONE = {
    **{"coming": 1, "making": 0, "preparing": 2, "in": 1, "first": 0, "between": 2, "late": 1},
    "stopped": 2,  # while it prepares
}
DEADLINE = 1.0


def gone(member: Member) -> Any:
    """One of three processes ends; what the others are told, and what they can do then."""
    moment, mine = member.option, GONE[member.option] == member.process
    whole, call = member.group(), toy_call()
    made: list[AsyncDenoiser] = []

    def die(*_: Any, **__: Any) -> None:
        if mine and moment == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if mine:
            member.die()

    def make() -> None:
        if moment == "coming":
            die()
        if moment == "making" and mine:
            AsyncDenoiser._given = die  # type: ignore[method-assign]
        if moment in ("preparing", "stopped") and mine:
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

    pid = member.folder / f"pid-{GONE[moment]}"
    if mine:
        pid.write_text(str(os.getpid()))
    found = told(work)
    if moment == "stopped":
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid.read_text()), signal.SIGKILL)
    for denoiser in made:
        denoiser.close()
    if moment == "late" and mine:
        return found
    left = [p for p in range(member.processes) if p != GONE[moment]]
    again = AsyncDenoiser(toy(), group=member.group("again", left), split=SPLIT, deadline=20)
    found["again"] = loop(again, call)
    again.close()
    return found


def raised(member: Member) -> Any:
    """Process 1 of two has an error of its own between two steps; the option: which, or that both
    leave there without one. What each is told, and what both draw then."""
    kind = {"ValueError": ValueError, "KeyboardInterrupt": KeyboardInterrupt}.get(member.option)
    call = toy_call()
    denoiser = AsyncDenoiser(toy(), group=member.group(), split=SPLIT, deadline=20)
    loop(denoiser, call)

    def at(step: int) -> None:
        if step == 3 and kind and member.process == 1:
            raise kind("of my own")

    def leave() -> None:
        with denoiser.generation(TIMES):
            for t in TIMES[:3]:
                denoiser(call["sample"], t, call["encoder_hidden_states"])

    try:
        found = told(lambda: loop(denoiser, call, at=at)) if kind else told(leave)
    except (ValueError, KeyboardInterrupt) as e:
        found = {"kind": type(e).__name__, "text": str(e)}
    found["again"] = loop(denoiser, call)
    denoiser.close()
    return found


#: What processes raise at once, each something else.
AT_ONCE: list[list[type[Exception] | None]] = [
    [CaptureError, RuntimeError, None],
    [RuntimeError, CaptureError, CaptureError],
    [CaptureError, InputError, None],
    [InputError, RuntimeError, ValueError],
    [None, CaptureError, CaptureError],
]


def at_once(member: Member) -> list[str]:
    """What a process is told where several have errors of their own, by case of AT_ONCE."""
    found, team = [], Team.of(member.group(), 20)
    for case in AT_ONCE:
        kind = case[member.process]

        def work(kind: Any = kind) -> None:
            if kind is not None:
                raise kind("mine")

        try:
            team.together("try", work)
        except Exception as e:
            found.append(type(e).__name__)
    team.close()
    return found


class Picks(nn.Module):
    """Reads those of its tokens that a mask has: its sizes depend on the mask's values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = (nn.Linear(4, 4, dtype=torch.double) for _ in range(2))

    def forward(
        self, sample: torch.Tensor, timestep: Any, tokens: torch.Tensor, mask: torch.Tensor
    ) -> Any:
        picked = tokens[mask.bool()].sum(0)
        return (self.leave(self.enter(sample).tanh() + picked * timestep.reshape(-1, 1)),)


def values(member: Member) -> list[Any]:
    """Process 1 cannot export such a denoiser, the option: or look at its mask, once; what each is
    told, and how far from the plain result the next calls are, of two masks."""
    module = Picks().eval()
    one = torch.tensor(0.5, dtype=torch.double)
    inputs = [torch.randn(2, *rest, 4).double() for rest in ((), (3,))]
    masks = [torch.tensor([[1, 1, 0], [1, 0, x]]) for x in (0, 1)]
    denoiser = AsyncDenoiser(module, group=member.group(), split="estimate", deadline=20)

    def far(mask: torch.Tensor) -> float:
        with denoiser.generation([one]):
            (got,) = denoiser(inputs[0], one, inputs[1], mask)
        return float((got - module(inputs[0], one, inputs[1], mask)[0]).abs().max())

    def fail(*_: Any) -> None:
        raise ValueError("not now")

    owner, name = {"export": (cutter, "kept_capture"), "look": (spread, "by_values")}[member.option]
    does = getattr(owner, name)
    if member.process == 1:
        setattr(owner, name, fail)
    try:
        found: list[Any] = [told(lambda: far(masks[0]))["text"]]
    except ValueError as e:
        found = [str(e)]
    setattr(owner, name, does)
    found += [far(mask) for mask in (*masks, masks[0])]
    denoiser.close()
    return found


def by_tokens(ranks: int, **where: Any) -> AsyncDenoiser:
    """One whose ranks share out tokens."""
    return AsyncDenoiser(attention(), components=ranks, schedule="sequence", **where)


def gone_among_tokens(member: Member) -> Any:
    """Process 1 of three is killed in the middle of a step whose tokens they share out; the option:
    where. What the others are told, and whether they can go on without it."""
    method = {"gives": "__call__", "takes": "take", "ends": "finish"}[member.option]
    does, count = getattr(Meetings, method), [0]

    def die(self: Meetings, *args: Any) -> Any:
        count[0] += 1
        if member.process == 1 and count[0] == 3:
            member.die()
        return does(self, *args)

    call = attention_call()
    denoiser = by_tokens(3, group=member.group(), deadline=DEADLINE)
    loop(denoiser, call)
    setattr(Meetings, method, die)
    found = told(lambda: loop(denoiser, call))
    setattr(Meetings, method, does)
    denoiser.close()
    again = by_tokens(2, group=member.group("again", [0, 2]), deadline=20)
    found["again"] = loop(again, call)
    again.close()
    return found


#: Seconds for which one that prepares may say nothing.
SILENCE = 1.5


def silent(member: Member) -> Any:
    """Process 1 takes long to prepare, and says so; then it stands still."""
    os.environ["ASYNCDIFF_PREPARE_DEADLINE"] = str(SILENCE)
    whole, call = member.group(), toy_call()
    warm_up = Worker.warm_up

    def busy(self: Worker, *args: Any, **kwargs: Any) -> Any:
        for part in range(10):
            heartbeat(f"part {part}")
            time.sleep(0.3)
        return warm_up(self, *args, **kwargs)

    def still(self: Worker, *args: Any, **kwargs: Any) -> Any:
        heartbeat("the last part")
        time.sleep(3 * SILENCE)
        return warm_up(self, *args, **kwargs)

    found: dict[str, Any] = {}
    for name, does in {"busy": busy, "still": still}.items():
        if member.process == 1:
            Worker.warm_up = does  # type: ignore[assignment,method-assign]
        denoiser = AsyncDenoiser(toy(), group=whole, split=SPLIT, deadline=DEADLINE)
        found[name] = told(lambda d=denoiser: loop(d, call))  # type: ignore[misc]
        denoiser.close()
    return found


def killed(member: Member) -> Any:
    """One process is killed at a random moment of making a denoiser and drawing with it; the others
    are told, and go on without it. The option: a seed."""
    chance = random.Random(int(member.option))
    victim, after = chance.randrange(member.processes), 2.5 * chance.random() ** 2
    group, call = member.group(), toy_call()
    if member.process == victim:
        threading.Timer(after, member.die).start()
    split = {2: SPLIT, 3: THREE, 4: FOUR}[member.processes]
    made: list[AsyncDenoiser] = []

    def work() -> None:
        denoiser = AsyncDenoiser(
            toy(), group=group, components=len(split), split=split, deadline=DEADLINE
        )
        made.append(denoiser)
        while True:
            loop(denoiser, call)

    found = told(work)
    for denoiser in made:
        denoiser.close()
    left = [p for p in range(member.processes) if p != victim]
    if len(left) > 1:
        again = AsyncDenoiser(
            toy(),
            group=member.group("again", left),
            components=len(left),
            split={2: SPLIT, 3: THREE}[len(left)],
            deadline=20,
        )
        found["again"] = loop(again, call)
        again.close()
    return found | {"victim": victim, "after": after}


def shapes(member: Member) -> list[dict[str, int]]:
    """What a process has after so many changes of shape, of which four are kept, and after more."""
    denoiser = AsyncDenoiser(toy(), group=member.group(), split=SPLIT, deadline=30)
    seen = []
    for rounds in (30, int(member.option)):
        for _ in range(rounds):
            for batch in range(1, 6):
                loop(denoiser, toy_call(batch=batch), TIMES[:2])
        gc.collect()
        maps = Path("/proc/self/maps").read_text()
        seen.append(
            {
                "descriptors": len(list(Path("/proc/self/fd").iterdir())),
                "threads": len(list(Path("/proc/self/task").iterdir())),
                "shared": maps.count("/dev/shm/"),
                "bytes": int(Path("/proc/self/statm").read_text().split()[1]) * 4096,
            }
        )
    denoiser.close()
    return seen
