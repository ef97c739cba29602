"""The options that several commands share, defined once, in groups that a command takes whole."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from .option_groups import Given
from .option_values import read_order, read_sizes, read_warmup


@dataclass(frozen=True)
class Waves:
    """How a generation is made parallel by waves: numbers of a plan."""

    components: Annotated[
        int, typer.Option("--components", "-N", help="Parts that the denoiser is split into.")
    ] = 2
    stride: Annotated[
        int, typer.Option("--stride", "-S", help="Sampler steps served by one tick.")
    ] = 1
    warmup: Annotated[
        str,
        typer.Option(
            "--warmup", "-w", help="First steps, run exactly; auto: while the output changes much."
        ),
    ] = "1"
    steps: Annotated[int, typer.Option("--steps", "-T", help="Sampler steps of a generation.")] = 50
    exact_tail: Annotated[int, typer.Option("--exact-tail", help="Last steps, run exactly.")] = 0
    delay: Annotated[
        int | None,
        typer.Option(
            "--delay",
            help="Of wavefront: ticks until a prediction arrives, 1 to N - 1. Left out: what "
            "measured best.",
        ),
    ] = None

    def how(self) -> tuple[str, str | None, bool]:
        """The schedule, the order as it was given, and whether times are shifted."""
        return "wavefront", None, False

    def check(self) -> None:
        """Raise PlanError for numbers that no plan has, as far as they are known: before torch is
        imported, and long before a model is loaded."""
        from ..schedule.plan import check_delay, check_numbers, check_schedule

        warmup = read_warmup(self.warmup)
        schedule, order, time_shift = self.how()
        check_schedule(
            schedule, stride=self.stride, time_shift=time_shift, exact_tail=self.exact_tail
        )
        check_numbers(
            self.components,
            self.stride,
            warmup if isinstance(warmup, int) else 1,
            self.steps,
            self.exact_tail,
        )
        check_delay(self.delay, schedule, self.components)
        if order is not None:
            predictor = read_order(order)
            from ..sampling.predictor import check_order

            check_order(predictor, schedule)

    @property
    def ranks(self) -> int:
        """Ranks that a generation takes, without those of a second condition."""
        from ..schedule.plan import rank_count

        return rank_count(self.components, self.stride, self.how()[0])

    def told(self) -> dict[str, Any]:
        """Arguments of :func:`asyncdiff.parallelize`, but the devices, as they were given."""
        schedule, order, time_shift = self.how()
        return {
            "components": self.components,
            "stride": self.stride,
            "warmup": read_warmup(self.warmup),
            "schedule": schedule,
            "exact_tail": self.exact_tail,
            "delay": self.delay,
            "order": order,
            "time_shift": time_shift,
        }

    def arguments(self) -> dict[str, Any]:
        """The same as they are passed: a calibration read from its file."""
        return self.told() | {"order": read_order(self.how()[1])}


@dataclass(frozen=True)
class Setting(Waves):
    """The same with the schedule to choose: arguments of :func:`asyncdiff.parallelize`, and the
    steps."""

    schedule: Annotated[
        str,
        typer.Option(
            "--schedule",
            help="asyncdiff (as published), wavefront (closer to the sequential result), pipeline "
            "(several pictures at once, exactly), or sequence (of transformers: devices share out "
            "the tokens, exactly).",
        ),
    ] = "asyncdiff"
    order: Annotated[
        str | None,
        typer.Option(
            "--order",
            help="Of wavefront: how far clean images are extrapolated, 0 to 1, or a file written "
            "by asyncdiff calibrate.",
        ),
    ] = None
    time_shift: Annotated[
        bool,
        typer.Option("--time-shift", help="Pass the timestep one index earlier in every tick."),
    ] = False

    def how(self) -> tuple[str, str | None, bool]:
        """The schedule, the order as it was given, and whether times are shifted."""
        return self.schedule, self.order, self.time_shift


@dataclass(frozen=True)
class Cards:
    """What is known of the devices of ranks."""

    speeds: Annotated[
        str | None,
        typer.Option(
            "--speeds",
            help="How fast the ranks' devices are, in any unit, as 1,0.6. Left out: unequal GPUs "
            "are measured.",
        ),
    ] = None

    max_memory: Annotated[
        str | None,
        typer.Option(
            "--max-memory",
            help="What the ranks' components may take of their devices, as 10GB,22GB (one for all, "
            "or one a rank). Left out: what is free on GPUs.",
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """Arguments of :func:`asyncdiff.parallelize`, those that were given. Raises InputError."""
        out: dict[str, Any] = {}
        if self.max_memory is not None:
            out["memory"] = read_sizes("--max-memory", self.max_memory)
            if len(out["memory"]) == 1:
                (out["memory"],) = out["memory"]
        if self.speeds is not None:
            try:
                out["speeds"] = [float(s) for s in self.speeds.split(",")]
            except ValueError:
                out["speeds"] = [0.0]
            if not all(0 < s < math.inf for s in out["speeds"]):
                raise InputError(f"--speeds {self.speeds!r}: write positive numbers, as 1,0.6")
        return out


@dataclass(frozen=True)
class Links:
    """How what crosses between devices does."""

    compress: Annotated[
        str | None,
        typer.Option(
            "--compress",
            help="What crosses in asynchronous steps becomes a byte a value: fp8 or int8; auto: "
            "fp8 where links would be waited for otherwise. Left out: all crosses as it is.",
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """Arguments of :func:`asyncdiff.parallelize`, those that were given. Raises InputError."""
        if self.compress not in (None, "fp8", "int8", "auto"):
            raise InputError(f"--compress {self.compress!r}: write fp8, int8 or auto")
        return {} if self.compress is None else {"compress": self.compress}


Devices = Annotated[
    str | None,
    typer.Option(
        "--devices",
        help="Devices, separated by commas, as cuda:0,cuda:1: those that may be used; by hand, one "
        "a rank (components + stride - 1; with other schedules than asyncdiff: components). May "
        "repeat; one alone stands for all ranks (for two, where a quality chooses). Left out: all "
        "visible GPUs, else the CPU.",
    ),
]
Quality = Annotated[
    str | None,
    typer.Option(
        "--quality",
        help="How close to the plain picture: exact, high, balanced or fast. Settings are chosen "
        "for the devices, steps, sampler and guidance. Left out: balanced, unless options that say "
        "how are given (--components, --warmup, --schedule, ...).",
    ),
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Compile the components with inductor: a minute once, a third faster then. Left out: "
        "for large denoisers on GPUs.",
    ),
]
CompileWhole = Annotated[
    bool,
    typer.Option(
        "--compile-whole",
        help="Compile each component as a whole, where blocks that are alike would be compiled "
        "once for all of them, which is sooner ready and as fast.",
    ),
]
SplitGuidance = Annotated[
    bool,
    typer.Option(
        "--split-guidance", help="Twice the ranks: each half takes one condition of the guidance."
    ),
]
ExactMode = Annotated[
    str,
    typer.Option(
        "--exact-mode",
        help="How exact steps run, but the last of the first ones: chain (one component after "
        "another), split (whole on two devices, a condition each), sequence (of transformers: on "
        "all devices, which share out the tokens), or auto (the fastest that there is room for).",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the starting noise.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Out = Annotated[
    Path, typer.Option("--out", "-o", help="The picture to write: .png, .jpg or .webp.")
]


def quality_of(asked: str | None, given: Given) -> str | None:
    """The quality that chooses settings: ``asked``, else the default; None where options that say
    how were ``given``. Raises InputError for one that there is not, or for both."""
    from ..quality import DEFAULT, check_quality

    how = {f.name for f in fields(Setting)} | {"split_guidance", "exact_mode"}
    by_hand = sorted(given.names & how - {"steps"})
    if asked is None:
        return None if by_hand else DEFAULT
    check_quality(asked)
    if by_hand:
        written = ", ".join("--" + name.replace("_", "-") for name in by_hand)
        raise InputError(
            f"--quality {asked} chooses what {written} would say: leave that out, or leave "
            "--quality out"
        )
    return asked
