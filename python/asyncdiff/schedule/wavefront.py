"""The wavefront schedule: one evaluation passes through the components in successive ticks.

At the tick of step k a *wave* k starts: component 0 runs at (x_k, t_k). Component i runs the wave
that started o_i ticks before (its *offset*), at that wave's own latents and timestep. The last
component delivers the noise prediction of step k ``delay`` ticks after the wave started. Until then
the sampler has taken steps on predictions: :mod:`asyncdiff.sampling.predictor`.

With the longest delay, N − 1, component i runs i ticks after the wave started, and finds every
value of its wave: the prediction is exact, and arrives N − 1 ticks late. With a shorter one no
offset exceeds the delay. Components with the same offset run at once, so that what one needs of
another is that of the wave before; what component 0 sends them is still the wave's own. What
arrives then is no exact prediction, so the sampler's errors are not known from it: the longest
delay is the default.

A value from component i reaches component j with a lag of o_j − o_i ticks, but at least one.
With a stride S a wave starts every S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..errors import PlanError
from .actions import Exchange
from .builder import Builder


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


class Waves(Builder):
    """Writes plans of waves. Every wave is one bundle on every channel, exact steps included, so
    that a bundle's ordinal is the number of its wave."""

    def __init__(
        self, components: int, stride: int, exchanges: Sequence[Exchange], slots: int, delay: int
    ) -> None:
        super().__init__(range(components), exchanges, slots)
        self.stride, self.delay = stride, delay
        self.offsets = offsets(components, delay)
        self.waves = 0  # those that were started

    def exact(self, k: int) -> None:
        """Write a step whose wave passes through all components in one tick."""
        for c in self.components:
            self._take(c, self.waves, own=True)
            self._run(c, k, self.waves, own=True)
            self._give_back(c, self.waves)
        self.waves += 1
        self.tick(True, (k,))

    def asynchronous(self, steps: range, more: bool) -> None:
        """Write a tick for every S steps.

        A wave that would not be finished is not started: nobody would use it. Where exact
        steps follow, all waves are finished, since the first of these can pay back what the sampler
        is owed (:mod:`asyncdiff.sampling.predictor`). It has to pass through all components anyway:
        the waves that are still under way go before it, in the same tick, and cost no time.
        """
        starts = steps[:: self.stride]
        waves = range(len(starts) if more else len(starts) - self.delay)
        for tick in range(len(starts) + self.delay):
            started = [(c, tick - after) for c, after in enumerate(self.offsets)]
            active = {c: self.waves + wave for c, wave in started if wave in waves}
            for c, wave in active.items():
                self._take(c, wave)
            for c, wave in active.items():
                self._run(c, starts[wave - self.waves], wave)
            for c, wave in active.items():
                self._give_back(c, wave)
            if tick < len(starts):
                self.tick(False, steps[tick * self.stride : (tick + 1) * self.stride])
        self.waves += len(waves)

    def _read(self, component: int, source: int, wave: int, own: bool = False) -> int:
        """The wave of ``source`` that a run of ``wave`` reads: in a tick, where both run the same
        wave at once, what ``source`` sent in the one before."""
        behind = self.offsets[component] == self.offsets[source] and not own
        return wave - behind

    def _take(self, component: int, wave: int, own: bool = False) -> None:
        """Take what a run of ``wave`` reads."""
        for source in self.sources[component]:
            self.take(component, source, self._read(component, source, wave, own) + 1)

    def _give_back(self, component: int, wave: int) -> None:
        """Give back what no run after that of ``wave`` reads."""
        for source in self.sources[component]:
            self.give_back(component, source, self._read(component, source, wave + 1))

    def _run(self, component: int, k: int, wave: int, own: bool = False) -> None:
        reads = [(s, self._read(component, s, wave, own)) for s in self.sources[component]]
        self.run(component, k, k, k if component == self.last else None, reads)
