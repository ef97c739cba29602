"""The wavefront schedule: one evaluation passes through the components in successive ticks.

At the tick of step k a *wave* k starts: component 0 runs at (x_k, t_k). Component i runs the wave
that started o_i ticks before (its *offset*), at that wave's own latents and timestep. The last
component delivers the noise prediction of step k ``delay`` ticks after the wave started. Until then
the sampler has taken steps on predictions: :mod:`asyncdiff.sampling.predictor`.

With the longest delay, N − 1, component i runs i ticks after the wave started, and finds every
value of its wave: the prediction is exact, and arrives N − 1 ticks late. With a shorter one no
offset exceeds the delay. Components with the same offset run at once, so that what one needs of
another is that of the wave before; what component 0 sends them is still the wave's own. In a UNet
the skip connections of full resolution, which make up most of a prediction, go from the first
component to the last: then a prediction one tick late is worth more than an exact one N − 1 late.

A value from component i reaches component j with a lag of o_j − o_i ticks, but at least one.
With a stride S a wave starts every S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..errors import PlanError
from .actions import Action, Exchange, Tick
from .ledger import Ledger


def shortest_delay(components: int, exchanges: Sequence[Exchange]) -> int:
    """Ticks from the first component to the last along the fewest exchanges.

    It is what measured best: the prediction is as late as the newest of what it is made from. 1
    where the first component sends to the last one, N − 1 in a chain. Exchanges go forwards.
    """
    hops = {0: 0}
    for j in range(1, components):
        before = [hops[e.source] for e in exchanges if e.target == j and e.source in hops]
        if before:
            hops[j] = min(before) + 1
    return hops.get(components - 1, components - 1)


def offsets(components: int, delay: int) -> tuple[int, ...]:
    """Ticks from a wave's start to its run, by component."""
    return tuple(min(c, delay) for c in range(components))


def lagged(exchanges: Sequence[Exchange], components: int, delay: int) -> tuple[Exchange, ...]:
    """The same exchanges with the lags of waves. Raises PlanError for one that goes backwards."""
    for e in exchanges:
        if e.target < e.source:
            raise PlanError(
                f"component {e.target} needs values of component {e.source}, which comes after it: "
                "a wave passes through the components in order. Split by cuts (split='auto' or "
                "'estimate'), or take schedule='asyncdiff'"
            )
    after = offsets(components, delay)
    return tuple(replace(e, lag=max(1, after[e.target] - after[e.source])) for e in exchanges)


class Builder:
    """Emits the ticks of waves. Every wave is one bundle on every channel, exact steps included,
    so that a bundle's ordinal is the number of its wave."""

    def __init__(
        self, components: int, stride: int, exchanges: Sequence[Exchange], delay: int, slots: int
    ) -> None:
        self.n = components
        self.stride = stride
        self.delay = delay
        self.offsets = offsets(components, delay)
        self.sources = {
            c: [e.source for e in exchanges if e.target == c] for c in range(components)
        }
        self.senders = {e.source for e in exchanges}
        self.ledger = Ledger(slots)
        self.waves = 0  # those before the next exact step

    def ticks(self, warmup: int, steps: int, exact_tail: int) -> list[Tick]:
        """All ticks."""
        out: list[Tick] = []
        for k in range(warmup):
            out.append(self._exact(len(out), k))
        out += self._asynchronous(len(out), warmup, steps - exact_tail)
        for k in range(steps - exact_tail, steps):
            out.append(self._exact(len(out), k))
        out[-1] = replace(out[-1], actions=out[-1].actions + self._empty())
        return out

    def _exact(self, index: int, k: int) -> Tick:
        """A step whose wave passes through all components in one tick."""
        actions: list[Action] = []
        for c in range(self.n):
            actions += self._take(c, self.waves, own=True)
            actions.append(self._run(c, k, self.waves, own=True))
            actions += self._give_back(c, self.waves)
        self.waves += 1
        return Tick(index, True, (k,), tuple(actions))

    def _asynchronous(self, index: int, begin: int, end: int) -> list[Tick]:
        """Steps ``begin`` … ``end`` − 1, at once.

        A wave that would not be finished is not started: nobody would use it.
        """
        out = []
        steps = range(begin, end, self.stride)
        waves = max(0, len(steps) - self.delay)
        for tick, first in enumerate(steps):
            active = {
                c: tick - after for c, after in enumerate(self.offsets) if 0 <= tick - after < waves
            }
            actions: list[Action] = []
            for c, wave in active.items():
                actions += self._take(c, self.waves + wave)
            actions += [self._run(c, steps[w], self.waves + w) for c, w in active.items()]
            for c, wave in active.items():
                actions += self._give_back(c, self.waves + wave)
            serves = tuple(range(first, min(first + self.stride, end)))
            out.append(Tick(index + tick, False, serves, tuple(actions)))
        self.waves += waves
        return out

    def _empty(self) -> tuple[Action, ...]:
        """Take and give back what nobody will read, so that the channels end empty."""
        ledger, actions = self.ledger, []
        for c, sources in self.sources.items():
            for source in sources:
                while ledger.held(c, source):
                    actions.append(ledger.release(c, source))
                while ledger.taken[c, source] < self.waves:
                    actions += [ledger.get(c, source), ledger.release(c, source)]
        return tuple(actions)

    def _read(self, component: int, source: int, wave: int, own: bool = False) -> int:
        """The wave of ``source`` that a run of ``wave`` reads: in a tick, where both run the same
        wave at once, what ``source`` sent in the one before."""
        behind = self.offsets[component] == self.offsets[source] and not own
        return wave - behind

    def _take(self, component: int, wave: int, own: bool = False) -> list[Action]:
        """Take what a run of ``wave`` reads; older bundles are given back first."""
        ledger, actions = self.ledger, []
        for source in self.sources[component]:
            while ledger.taken[component, source] <= self._read(component, source, wave, own):
                if ledger.held(component, source):
                    actions.append(ledger.release(component, source))
                actions.append(ledger.get(component, source))
        return actions

    def _give_back(self, component: int, wave: int) -> list[Action]:
        """Give back what no run after that of ``wave`` reads."""
        ledger, actions = self.ledger, []
        for source in self.sources[component]:
            next_read = self._read(component, source, wave + 1)
            while ledger.held(component, source) and ledger.freed[component, source] < next_read:
                actions.append(ledger.release(component, source))
        return actions

    def _run(self, component: int, k: int, wave: int, own: bool = False) -> Action:
        return self.ledger.run(
            component,
            component,
            latents=k,
            time=k,
            step=k if component == self.n - 1 else None,
            reads=[(s, self._read(component, s, wave, own)) for s in self.sources[component]],
            sends=component in self.senders,
        )
