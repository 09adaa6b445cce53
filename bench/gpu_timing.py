"""Timing on a GPU: CUDA graphs of many calls, buffers that rotate, rivals in turns.

A rival is a list of calls that do the same on different buffers. A graph holds its calls one after the
other, again and again, so that the launch cost is gone and no call finds its operands in L2 from the call
before; the graphs of the rivals are then replayed in turn, so that a clock that falls falls for all. What
cannot be captured is called from Python and says so.

On a CPU the same goes through `time.perf_counter`: for trying the programs out, not for figures.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Call = Callable[[], object]

REPLAY = 2e-3  # seconds of work in a graph
MOST_CALLS = 64  # in a graph


@dataclass(frozen=True)
class Sample:
    """Microseconds of one call.

    Attributes:
        median, low, high: of the turns: 50 %, 20 % and 80 %.
        how: "graph", "eager" or "cpu".
    """

    median: float
    low: float
    high: float
    how: str


class Clock:
    """Times rivals on one device.

    Args:
        device: "cuda" or "cpu".
        turns: times that each rival is replayed.
    """

    def __init__(self, device: str, turns: int = 10) -> None:
        self.device, self.turns = device, turns
        # Forward, backward and capture on one stream: autograd returns to the stream of the forward.
        self.stream = torch.cuda.Stream() if device == "cuda" else None

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Inside, everything runs on the stream that is timed: operands are made there, too."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.stream is not None:
            torch.cuda.synchronize()

    def warm_up(self, seconds: float = 0.3) -> None:
        """Bring the device to its clock under load."""
        if self.stream is None:
            return
        a = torch.randn(4096, 4096, device=self.device, dtype=torch.bfloat16)
        end = time.perf_counter() + seconds
        with self.on_stream():
            while time.perf_counter() < end:
                for _ in range(20):
                    a @ a
                torch.cuda.synchronize()

    def compare(self, rivals: dict[str, list[Call]]) -> dict[str, Sample]:
        """Time every rival, in turns."""
        with self.on_stream():
            runs = {name: self._prepare(calls) for name, calls in rivals.items()}
            times: dict[str, list[float]] = {name: [] for name in runs}
            for turn in range(1 + self.turns):
                for name, (run, count, _) in runs.items():
                    us = self._time(run) / count
                    if turn:
                        times[name].append(us)
            self.synchronize()
        return {name: _sample(times[name], how) for name, (_, _, how) in runs.items()}

    def once(self, call: Call) -> tuple[float, float]:
        """Microseconds of one call: until it returns on the host, and of its work on the device."""
        with self.on_stream():
            self.synchronize()
            start = time.perf_counter()
            if self.stream is None:
                call()
                host = (time.perf_counter() - start) * 1e6
                return host, host
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            start = time.perf_counter()
            call()
            host = (time.perf_counter() - start) * 1e6
            end.record()
            self.synchronize()
            return host, begin.elapsed_time(end) * 1e3

    def host(self, call: Call, calls: int = 200) -> Sample:
        """Microseconds until a call returns on the host. The work must be small, or its queue fills up."""
        found = []
        with self.on_stream():
            for _ in range(1 + self.turns):
                self.synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    call()
                found.append((time.perf_counter() - start) * 1e6 / calls)
            self.synchronize()
        return _sample(found[1:], "eager" if self.stream else "cpu")

    def _time(self, run: Call) -> float:
        if self.stream is None:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e6
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3

    def _prepare(self, calls: list[Call]) -> tuple[Call, int, str]:
        """What to run, how many calls that is, and how they are made."""
        for call in calls:  # compiles, and makes descriptors and plans
            call()

        def all_of_them() -> None:
            for call in calls:
                call()

        if self.stream is None:
            return all_of_them, len(calls), "cpu"
        self.synchronize()
        us = self._time(all_of_them) / len(calls)
        rounds = max(1, min(round(REPLAY * 1e6 / us), MOST_CALLS) // len(calls))

        def many() -> None:
            for _ in range(rounds):
                all_of_them()

        # Not even tried: after a capture that failed torch may not be able to make another.
        if _synchronises(calls[0]):
            return many, rounds * len(calls), "eager"
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                many()
        except (RuntimeError, NotImplementedError):  # it asks the driver for memory
            self.synchronize()
            return many, rounds * len(calls), "eager"
        return graph.replay, rounds * len(calls), "graph"


def _synchronises(call: Call) -> bool:
    """Whether the host waits for the device in a call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError:
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return False


def _sample(us: list[float], how: str) -> Sample:
    if len(us) < 2:
        return Sample(us[0], us[0], us[0], how)
    fifths = statistics.quantiles(us, n=5, method="inclusive")
    return Sample(statistics.median(us), fifths[0], fifths[-1], how)
