"""Timing that survives a noisy machine: rivals take turns in one process, and medians are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

Step = Callable[[], object]


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


CALLS = 5  # of a rival in its turn


def interleaved(rivals: dict[str, list[Step]], repeats: int, warmup: int = 1) -> dict[str, list[Times]]:
    """Time the phases of every rival in turn: A five times, B five times, A five times, ...

    A turn is several calls so that most of them do not find the caches full of the rival's weights, which
    no training loop has beside a layer.

    Args:
        rivals: name -> its phases, called in order (a backward after its forward).
        repeats: timed turns.
        warmup: turns before those.

    Returns:
        name -> the times of each of its phases.
    """
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in phases] for name, phases in rivals.items()}
    for turn in range(warmup + repeats):
        for name, phases in rivals.items():
            for _ in range(CALLS):
                for phase, kept in zip(phases, seconds[name], strict=True):
                    start = time.perf_counter()
                    phase()
                    if turn >= warmup:
                        kept.append(time.perf_counter() - start)
    return {name: [_summary(kept) for kept in phases] for name, phases in seconds.items()}


def _summary(seconds: list[float]) -> Times:
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (median, median, median)
    return Times(median, min(seconds), (high - low) / median)
