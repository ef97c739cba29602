"""Which of the denoiser's calls in a step of the sampler is meant."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError


@dataclass(frozen=True)
class Branch:
    """Which of the denoiser's calls in a step of the sampler this is: the ``index``-th of
    ``count``, as far as that is known. Guidance in one batch is one call; where each condition is
    a call of its own, each is a branch, with ranks' memory of the steps before of its own."""

    index: int = 0
    count: int = 1

    @staticmethod
    def each(count: int) -> list[Branch]:
        """All of so many. Raises InputError unless that is a number from 1."""
        if not isinstance(count, int) or count < 1:
            raise InputError(f"branches={count!r}: give the number of calls in a step, 1 or more")
        return [Branch(index, count) for index in range(count)]


#: The only call in a step.
ONLY = Branch()
