"""The asynchronous settings that are timed, as one writes them on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from asyncdiff.schedule.plan import rank_count

#: What may follow N,S,w: its name, the field that it sets, and what it means.
OPTIONS = {
    "waves": ("waves", "schedule='wavefront'"),
    "split": ("split", "guidance='split': twice the ranks"),
    "splitwarm": ("split_warmup", "exact_mode='split'"),
    "sequence": ("sequence", "schedule='sequence'"),
    "sequencewarm": ("sequence_warmup", "exact_mode='sequence'"),
}


@dataclass(frozen=True)
class Setting:
    """N, S, w, the exact steps at the end, the delay of waves (None: the default), and options."""

    components: int
    stride: int
    warmup: int
    tail: int = 0
    delay: int | None = None
    waves: bool = False
    split: bool = False
    split_warmup: bool = False
    sequence: bool = False
    sequence_warmup: bool = False

    @classmethod
    def parse(cls, text: str) -> Setting:
        """``2,1,1`` or ``2,1,9,splitwarm`` or ``3,1,1,waves,delay=2,tail=2``. Raises ValueError."""
        numbers, options = text.split(",")[:3], text.split(",")[3:]
        if len(numbers) != 3:
            raise ValueError(f"{text!r}: write N,S,w, then options")
        fields: dict[str, Any] = {}
        for option in options:
            name, equals, number = option.partition("=")
            if equals and name in ("tail", "delay"):
                fields[name] = int(number)
            elif option in OPTIONS:
                fields[OPTIONS[option][0]] = True
            else:
                raise ValueError(f"{option!r}: there are tail=J, delay=D and {', '.join(OPTIONS)}")
        return cls(*map(int, numbers), **fields)

    @property
    def name(self) -> str:
        """What its row is called."""
        out = f"N={self.components} S={self.stride} w={self.warmup}"
        out += f" tail={self.tail}" if self.tail else ""
        out += f" delay={self.delay}" if self.delay else ""
        return out + "".join(f" {key}" for key, (field, _) in OPTIONS.items() if vars(self)[field])

    @property
    def schedule(self) -> str:
        """The schedule's name."""
        if self.sequence:
            return "sequence"
        return "wavefront" if self.waves else "asyncdiff"

    @property
    def exact_mode(self) -> str:
        """How exact steps run."""
        return {(1, 0): "split", (0, 1): "sequence"}.get(
            (self.split_warmup, self.sequence_warmup), "chain"
        )

    @property
    def ranks(self) -> int:
        """How many devices it takes."""
        return rank_count(self.components, self.stride, self.schedule) * (2 if self.split else 1)

    def enough(self, steps: int) -> int:
        """At least so many steps, and exact ones and ticks in all slots among them."""
        return max(steps, self.warmup + self.tail + 2 * self.components * self.stride)

    @property
    def team(self) -> tuple[Any, ...]:
        """What has to be prepared anew; all else may change between generations."""
        return self.components, self.stride, self.schedule, self.delay, self.split
