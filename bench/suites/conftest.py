"""Options of the benchmark, the board that collects its rows, and what is printed and written at the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import report
from bench.measure import Row, fma_peak
from bench.timing import Race

BOARD = pytest.StashKey["Board"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench", "CPU benchmark")
    group.addoption("--threads", type=int, default=1, help="torch's thread count, for all rivals")
    group.addoption("--budget", type=float, default=1.5, help="seconds for the timed turns of one figure")
    group.addoption("--no-peers", action="store_true", help="race dense layers only")
    group.addoption("--quick", action="store_true", help="the most telling figures only, short turns")
    group.addoption("--smoke", action="store_true", help="every part once at tiny sizes: no figures")
    group.addoption(
        "--out", type=Path, default=Path("runs/bench"), help="folder of the files; default %(default)s"
    )
    group.addoption("--record", action="store_true", help="write to bench/results/<this machine>")
    group.addoption("--add", action="store_true", help="keep rows of the files that are not measured again")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.option.threads)
    os.environ["OMP_NUM_THREADS"] = str(config.option.threads)  # read by SparseProp and by children
    # Rivals warn of much; tests of the package itself take warnings for errors.
    config.addinivalue_line("filterwarnings", "ignore")
    # Our tables say more than pytest-benchmark's, which has no rivals. Its own with -v, its JSON as ever.
    if hasattr(config.option, "benchmark_quiet") and config.option.verbose <= 0:
        config.option.benchmark_quiet = True
    if config.option.quick:
        config.option.budget = min(config.option.budget, 0.8)
    if config.option.smoke:
        config.option.budget = 1e-3
    config.stash[BOARD] = Board(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """--quick keeps what is marked so, --smoke the tiny cases, and neither the rest."""
    want = "smoke" if config.option.smoke else "quick" if config.option.quick else ""
    kept = []
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if want in marks if want else "smoke" not in marks:
            kept.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


class Board:
    """Where the rows go."""

    def __init__(self, config: pytest.Config) -> None:
        self.rows: list[Row] = []
        self.config = config

    @property
    def out(self) -> Path:
        option = self.config.option
        return Path("bench/results") / report.machine() if option.record else option.out

    def add(self, rows: list[Row]) -> None:
        """Keep rows, and say the last of them."""
        self.rows += rows
        self.say(report.line(rows[-1]))

    def say(self, text: str) -> None:
        reporter: Any = self.config.pluginmanager.getplugin("terminalreporter")
        reporter.ensure_newline()
        reporter.write_line(text)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    board = config.stash[BOARD]
    if not board.rows:
        return
    report.show(board.rows, board.out, terminalreporter.write_line)
    for path in report.write(board.rows, board.out, config.option.add):
        terminalreporter.write_line(f"written: {path}")


@pytest.fixture(scope="session", autouse=True)
def peak(request: pytest.FixtureRequest) -> float:
    """Measured first, while nothing else of ours runs."""
    return fma_peak(request.config.option.threads)


@pytest.fixture
def board(request: pytest.FixtureRequest) -> Board:
    return request.config.stash[BOARD]


@pytest.fixture
def budget(request: pytest.FixtureRequest) -> float:
    return float(request.config.option.budget)


@pytest.fixture
def peers(request: pytest.FixtureRequest) -> bool:
    return not request.config.option.no_peers


@pytest.fixture
def start(benchmark: Any) -> Any:
    """Runs a race under pytest-benchmark.

    pytest-benchmark by itself times one function after another, minutes apart, which compares the weather on
    the machine. It calls a `setup` before each round, though, outside its clock: there the rivals take
    their turn. So its rounds, statistics, `--benchmark-compare` and JSON are those of our calls, and the
    ratios are still taken turn by turn.
    """

    def run(race: Race, ours: str) -> None:
        calls = race.calls_of(ours)
        made = 0

        def others() -> None:
            nonlocal made
            if made % calls == 0:
                for name in race.contestants:
                    if name != ours:
                        race.turn(name)
            made += 1

        if benchmark.disabled:
            race.run()
            benchmark(lambda: None)
            return
        benchmark.pedantic(race.contestants[ours].call, setup=others, rounds=race.turns * calls, iterations=1)
        for name in race.contestants:
            benchmark.extra_info[name] = race.times(name).median

    return run
