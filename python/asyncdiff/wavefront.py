"""The wavefront schedule: one evaluation passes through the components in successive ticks.

At the tick of step k a *wave* k starts: component 0 runs at (x_k, t_k). Component i runs the wave
that started i ticks before, at that wave's own latents and timestep, on that wave's values from
every earlier component. Nothing inside a wave is stale, so that the last component delivers the
exact noise prediction of step k, N − 1 ticks after the wave started. Until then the sampler has
taken steps on predictions: :mod:`asyncdiff.predictor`.

A value from component i reaches component j with a lag of j − i ticks, so that skip connections
travel with the hidden states of their wave. With a stride S a wave starts every S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .actions import Action, Exchange, Kind, Tick
from .errors import PlanError


def lagged(exchanges: Sequence[Exchange]) -> tuple[Exchange, ...]:
    """The same exchanges with the lags of waves. Raises PlanError for one that goes backwards."""
    for e in exchanges:
        if e.target < e.source:
            raise PlanError(
                f"component {e.target} needs values of component {e.source}, which comes after it: "
                "a wave passes through the components in order. Split by cuts (split='auto' or "
                "'estimate'), or take schedule='asyncdiff'"
            )
    return tuple(replace(e, lag=e.target - e.source) for e in exchanges)


def delay(components: int, stride: int) -> int:
    """Sampler steps between a wave's start and the end of the tick that finishes it."""
    return (components - 1) * stride


class Builder:
    """Emits the ticks of waves. Every wave is one bundle on every channel, exact steps included,
    so that a bundle's ordinal is the number of its wave."""

    def __init__(self, components: int, stride: int, exchanges: Sequence[Exchange]) -> None:
        self.n = components
        self.stride = stride
        self.sources = {
            c: [e.source for e in exchanges if e.target == c] for c in range(components)
        }
        self.senders = {e.source for e in exchanges}
        self.waves = 0  # those before the next exact step
        self.ticks: list[Tick] = []

    def exact(self, k: int) -> None:
        """A step whose wave passes through all components in one tick."""
        actions: list[Action] = []
        for c in range(self.n):
            actions += self._turn(Kind.GET, c)
            actions.append(self._run(c, k, self.waves))
            actions += self._turn(Kind.RELEASE, c)
        self.waves += 1
        self.ticks.append(Tick(len(self.ticks), True, (k,), tuple(actions)))

    def asynchronous(self, begin: int, end: int, drain: bool) -> None:
        """Steps ``begin`` … ``end`` − 1, at once; with ``drain`` the last waves are finished.

        A wave that would not be finished is not started: nobody would use it.
        """
        steps = range(begin, end, self.stride)
        extra = self.n - 1 if drain and steps else 0
        waves = max(0, len(steps) + extra - (self.n - 1))
        for tick in range(len(steps) + extra):
            serves: tuple[int, ...] = ()
            if tick < len(steps):
                serves = tuple(range(steps[tick], min(steps[tick] + self.stride, end)))
            active = [c for c in range(self.n) if 0 <= tick - c < waves]
            actions = [a for c in active for a in self._turn(Kind.GET, c)]
            actions += [self._run(c, steps[tick - c], self.waves + tick - c) for c in active]
            actions += [a for c in active for a in self._turn(Kind.RELEASE, c)]
            self.ticks.append(Tick(len(self.ticks), False, serves, tuple(actions)))
        self.waves += waves

    def _turn(self, kind: Kind, component: int) -> list[Action]:
        return [Action(kind, component, source) for source in self.sources[component]]

    def _run(self, component: int, k: int, wave: int) -> Action:
        return Action(
            Kind.RUN,
            component,
            component,
            latents=k,
            time=k,
            step=k if component == self.n - 1 else None,
            put=wave if component in self.senders else None,
            reads=tuple((source, wave) for source in self.sources[component]),
        )
