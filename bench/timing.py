"""Timing that survives a noisy machine: rivals take turns in one process, and their ratios are compared."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Step = Callable[[], object]

CALLS = 5  # of a rival in its turn
TURNS = (5, 40)  # the fewest and the most
LONG_TURNS = 3  # of calls so long that the budget does not hold these
NOISY = 0.2  # spread above which a figure is not judged
CROWDED = 0.1  # cores taken from us by others, likewise


@dataclass(frozen=True)
class Times:
    """Seconds of the timed calls of one rival.

    Attributes:
        median: the figure to quote.
        fastest: the least disturbed call.
        spread: interquartile range over the median; above 0.2 the machine was too noisy to quote.
    """

    median: float
    fastest: float
    spread: float


@dataclass
class Contestant:
    """Who takes part in a race.

    Attributes:
        phases: called in order, each timed (a backward after its forward).
        before: called before each call, not timed.
        calls: in a turn; the race's if None.
    """

    phases: Sequence[Step]
    before: Step = lambda: None
    calls: int | None = None
    samples: list[tuple[float, ...]] = field(default_factory=list)

    def call(self) -> None:
        """One call, timed."""
        self.before()
        clock = [time.perf_counter()]
        for phase in self.phases:
            phase()
            clock.append(time.perf_counter())
        self.samples.append(tuple(b - a for a, b in zip(clock, clock[1:], strict=False)))


class Race:
    """Contestants in turns: A five times, B five times, A five times, ...

    A turn is several calls so that most of them do not find the caches full of the rival's weights, which
    no training loop has beside a layer. A long call needs no such company: its turn is shorter.

    Args:
        contestants: by name. The first to run in a turn is the first here.
        budget: seconds that the turns may take together.
    """

    def __init__(self, contestants: dict[str, Contestant], budget: float) -> None:
        fewest, most = TURNS
        self.contestants = contestants
        self.calls, self.turns = 1, LONG_TURNS
        # First calls allocate, and choose algorithms. Of long ones they are all the warming up.
        first = self._timed_turn()
        if first < budget / LONG_TURNS:
            self.calls = max(1, min(CALLS, int(budget / fewest / self._timed_turn())))
            turn = self._timed_turn()
            self.turns = max(fewest, min(most, int(budget / turn)))
        for contestant in contestants.values():
            contestant.samples.clear()
        self._begin = _clocks()

    def crowd(self, threads: int) -> float:
        """Cores that others kept from us since the turns began: a turn that is slow as a whole looks calm."""
        wall, busy, own = (now - then for now, then in zip(_clocks(), self._begin, strict=True))
        spare = len(os.sched_getaffinity(0)) - threads if busy else 0
        return max(0.0, (busy - own) / wall - spare) if busy else 0.0

    def _timed_turn(self) -> float:
        start = time.perf_counter()
        for name in self.contestants:
            self.turn(name)
        return time.perf_counter() - start

    def calls_of(self, name: str) -> int:
        """Calls in a turn of one contestant."""
        return self.contestants[name].calls or self.calls

    def turn(self, name: str) -> None:
        """All calls of one contestant's turn."""
        for _ in range(self.calls_of(name)):
            self.contestants[name].call()

    def run(self) -> Race:
        """All turns of all."""
        for _ in range(self.turns):
            for name in self.contestants:
                self.turn(name)
        return self

    def seconds(self, name: str, phase: int | None = None) -> list[float]:
        """Of every call; of all phases together if none is given."""
        samples = self.contestants[name].samples
        return [sum(sample) if phase is None else sample[phase] for sample in samples]

    def times(self, name: str, phase: int | None = None) -> Times:
        """The calls of one contestant, summed up."""
        return summary(self.seconds(name, phase))

    def ratio(self, theirs: str, ours: str, phase: int | None = None) -> Times:
        """Their time over ours, turn by turn: what disturbs a turn disturbs both."""
        pairs = zip(self._by_turn(theirs, phase), self._by_turn(ours, phase), strict=True)
        return summary([a / b for a, b in pairs])

    def best(self, names: Sequence[str], phase: int | None = None) -> str:
        """The fastest of some, by the median."""
        return min(names, key=lambda name: self.times(name, phase).median)

    def _by_turn(self, name: str, phase: int | None) -> list[float]:
        seconds, calls = self.seconds(name, phase), self.calls_of(name)
        return [statistics.median(seconds[i : i + calls]) for i in range(0, len(seconds), calls)]


def _clocks() -> tuple[float, float, float]:
    """Seconds: on the wall, of all work on the processors we may use (0 where unknown), and of our own."""
    try:
        ours = {f"cpu{n}" for n in os.sched_getaffinity(0)}
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    except (AttributeError, OSError):  # not Linux
        return time.perf_counter(), 0.0, 0.0
    # user, nice, system, (idle, waiting,) interrupts of two kinds, stolen by other machines
    ticks = sum(int(line[i]) for line in lines if line[0] in ours for i in (1, 2, 3, 6, 7, 8))
    return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time()


def interleaved(contestants: dict[str, Contestant], repeats: int, warmup: int = 1) -> dict[str, list[Times]]:
    """Time contestants in a given number of turns of five calls.

    Returns:
        name -> the times of each of its phases.
    """
    for turn in range(warmup + repeats):
        for contestant in contestants.values():
            if turn == warmup:
                contestant.samples.clear()
            for _ in range(CALLS):
                contestant.call()
    return {
        name: [summary([s[p] for s in contestant.samples]) for p in range(len(contestant.phases))]
        for name, contestant in contestants.items()
    }


def summary(seconds: list[float]) -> Times:
    """Median, minimum and spread."""
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (median, median, median)
    return Times(median, min(seconds), (high - low) / median)
