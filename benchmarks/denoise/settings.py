"""The asynchronous settings that are timed, as one writes them on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from asyncdiff.plan import rank_count

#: What may follow N,S,w: its name, the field that it sets, and what it means.
OPTIONS = {
    "waves": ("waves", "schedule='wavefront'"),
    "split": ("split", "guidance='split': twice the ranks"),
    "splitwarm": ("split_warmup", "warmup_mode='split'"),
    "generate": ("generate", "AsyncDenoiser.generate: the sampler's steps on the ranks"),
}


@dataclass(frozen=True)
class Setting:
    """N, S, w, the exact steps at the end, and options."""

    components: int
    stride: int
    warmup: int
    tail: int = 0
    waves: bool = False
    split: bool = False
    split_warmup: bool = False
    generate: bool = False

    @classmethod
    def parse(cls, text: str) -> Setting:
        """``2,1,1`` or ``2,1,9,splitwarm`` or ``3,1,1,waves,tail=2``. Raises ValueError."""
        numbers, options = text.split(",")[:3], text.split(",")[3:]
        if len(numbers) != 3:
            raise ValueError(f"{text!r}: write N,S,w, then options")
        fields: dict[str, Any] = {}
        for option in options:
            if option.startswith("tail="):
                fields["tail"] = int(option.removeprefix("tail="))
            elif option in OPTIONS:
                fields[OPTIONS[option][0]] = True
            else:
                raise ValueError(f"{option!r}: there are tail=J and {', '.join(OPTIONS)}")
        return cls(*map(int, numbers), **fields)

    @property
    def name(self) -> str:
        """What its row is called."""
        out = f"N={self.components} S={self.stride} w={self.warmup}"
        if self.tail:
            out += f" tail={self.tail}"
        return out + "".join(f" {key}" for key, (field, _) in OPTIONS.items() if vars(self)[field])

    @property
    def schedule(self) -> str:
        """The schedule's name."""
        return "wavefront" if self.waves else "asyncdiff"

    @property
    def ranks(self) -> int:
        """How many devices it takes."""
        return rank_count(self.components, self.stride, self.schedule) * (2 if self.split else 1)

    @property
    def team(self) -> tuple[Any, ...]:
        """What has to be prepared anew; all else may change between generations."""
        return self.components, self.stride, self.schedule, self.split
