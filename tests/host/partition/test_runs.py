"""What components take by runs that other processes disturb; random numbers have seeds."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence

import pytest

from asyncdiff.partition.runs import RUNS, settled, typical

#: Milliseconds of both components, undisturbed, and of a run.
EACH, RUN = 20.0, 120.0
EVEN = [EACH, EACH]


class Gpu:
    """A GPU that a process shares by time slices with another one, which works for 2 ms and then
    pauses; once in ``stalls`` times it pauses for 20 to 150 ms. ``until``: ms after which it has
    gone (0: there is none)."""

    def __init__(self, seed: int, until: float = 0.0, pause: float = 2.2, stalls: int = 0) -> None:
        self._random = random.Random(seed)
        self._until, self._pause, self._stalls = until, pause, stalls
        self.now = 0.0

    def run(self) -> float:
        """Milliseconds of a component, the mean of a run."""
        begun, left = self.now, RUN * self._random.gauss(1.0, 0.003)
        while left > 0:
            if self.now >= self._until:
                self.now += left
                break
            self.now += 2.0
            free = self._random.uniform(0, 2) + self._pause + self._random.expovariate(10)
            if self._stalls and self._random.randrange(self._stalls) == 0:
                free += self._random.uniform(20, 150)
            self.now += min(free, left)
            left -= free
        return (self.now - begun) * EACH / RUN


def found(first: Gpu, second: Gpu, expected: Sequence[float] = EVEN) -> list[float] | None:
    def run() -> list[float]:
        both = [first.run(), second.run()]
        first.now = second.now = max(first.now, second.now)
        return both

    return typical(run, expected)


def ratios(make: Callable[[int], tuple[Gpu, Gpu]], cases: int = 200) -> list[float]:
    """By how much the second one seems to be slower, by case."""
    times = [found(*make(seed)) for seed in range(cases)]
    return [1.0 if ms is None else ms[1] / ms[0] for ms in times]


def given(runs: Sequence[Sequence[float]]) -> Callable[[], Sequence[float]]:
    """Of these runs the next, and of the last one as many as are wanted."""
    rest = list(runs)
    return lambda: rest.pop(0) if len(rest) > 1 else rest[0]


# ---- one that is slower for good -----------------------------------------------------------------


@pytest.mark.parametrize("pause", [1.6, 2.2, 6.0])
@pytest.mark.parametrize("stalls", [0, 400])
def test_a_gpu_that_another_process_shares_is_slower(pause: float, stalls: int) -> None:
    got = ratios(lambda seed: (Gpu(seed), Gpu(-1 - seed, 1e9, pause, stalls)))
    slow = Gpu(7, 1e9, pause)
    true = statistics.mean(slow.run() for _ in range(200)) / EACH
    assert sum(r < 1.1 for r in got) <= 1
    assert statistics.median(got) == pytest.approx(true, rel=0.02)


@pytest.mark.parametrize("undisturbed", [0, 1, 3])
@pytest.mark.parametrize("first", [True, False])
def test_a_few_undisturbed_runs_do_not_make_it_fast(undisturbed: int, first: bool) -> None:
    """Two of them agree, wherever they are."""
    slow = [[10.0, ms] for ms in (16.1, 19.0, 13.2, 17.1, 16.4, 15.2, 18.0, 16.0, 15.6)]
    fast = [[10.05, 10.0]] * undisturbed
    others = [[10.02, 16.6]] * (3 - undisturbed)
    runs = [*fast, *slow, *others] if first else [*slow, *others, *fast]
    if first and undisturbed == 3:
        runs = [fast[0], fast[1], slow[0], fast[2], *slow[1:]]
    got = typical(given(runs), [10.0, 10.0])
    assert got is not None and got[0] < 10.1 and 15 < got[1] < 17


def test_it_is_compared_with_what_nodes_cost() -> None:
    """Where a denoiser cannot be cut evenly."""
    runs = [[20.0, 20.4 + 0.35 * i] for i in range(RUNS[1])]
    assert typical(given(runs), [20.0, 15.0]) == pytest.approx([20.0, 22.325])
    assert typical(given(runs), [20.0, 20.0]) is None


def test_one_that_is_known_to_be_busy_counts_by_its_usual_runs() -> None:
    """They never agree, and the cut for it would not be kept."""
    runs = [[13.0, 11.5 + 0.3 * i] for i in range(RUNS[1])]
    assert typical(given(runs), [13.0, 13.0]) is None
    assert typical(given(runs), [13.0, 13.0], busy=True) == pytest.approx([13.0, 13.15])
    # It is idle now, or was for half of them.
    assert typical(given([[13.0, 8.0]]), [13.0, 13.0], busy=True) == [13.0, 8.0]
    half = [[13.0, ms] for ms in (8.0, 14.0, 8.3, 13.5, 8.6, 15.0, 9.0, 9.3, 13.0, 9.6, 9.9, 9.5)]
    assert typical(given(half), [13.0, 13.0], busy=True) is None


# ---- equal ones ----------------------------------------------------------------------------------


def test_three_quiet_runs_do() -> None:
    runs: list[list[float]] = []

    def run() -> list[float]:
        runs.append([[10.0, 5.0], [10.05, 5.02], [10.3, 5.1]][len(runs)])
        return runs[-1]

    assert typical(run, [11.0, 5.2]) == [10.0, 5.0]
    assert len(runs) == RUNS[0]
    assert not settled(runs[:2], [11.0, 5.2])
    # A device that seems to be slower needs more of them.
    assert not settled(runs, [10.0, 4.5])


@pytest.mark.parametrize("until", [100, 400, 700])
@pytest.mark.parametrize("which", [0, 1])
def test_equal_ones_stay_equal_where_one_is_disturbed_for_a_while(until: float, which: int) -> None:
    def make(seed: int) -> tuple[Gpu, Gpu]:
        both = Gpu(seed, until), Gpu(-1 - seed)
        return both[which], both[1 - which]

    got = ratios(make)
    assert max(abs(r - 1) for r in got) < 0.03


@pytest.mark.parametrize("until", [500, 1e9])
@pytest.mark.parametrize("stalls", [0, 400])
def test_equal_ones_stay_equal_where_both_are_disturbed(until: float, stalls: int) -> None:
    got = ratios(lambda seed: (Gpu(seed, until), Gpu(-1 - seed, until, 2.2, stalls)))
    assert all(1 / 1.1 < r < 1.1 for r in got)
