"""What changing the topology costs on the CPU: a topology batch of RigL against an ordinary training step.

    python -m bench.update                               # one thread, SGD with momentum
    python -m bench.update --sizes 1024 --optimizer adamw --parts

An ordinary step is forward, backward (all three products) and the optimizer's step of one layer. A topology
batch has an update in place of the optimizer's step: what it takes longer is the cost of the update, given
in milliseconds and in ordinary steps. The dense weight gradient `dY^T X`, which RigL scores every position
by, is measured beside it, and so is the step that follows the update.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rigl
from sparse_kernels import _ops
from sparse_kernels.growth import GrowthScorer

from .report import machine


@dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
        sizes: features in and out of the layer.
        densities: fractions of active weights.
        batch: tokens.
        optimizer: "sgd" (with momentum) or "adamw".
        alpha: fraction of the weights replaced by an update.
        threads: torch's thread count.
        updates: topology batches timed, each among five ordinary steps.
        parts: also print where the time of an update goes.
        out: folder of the JSON file.
    """

    sizes: tuple[int, ...] = (1024, 2048, 4096)
    densities: tuple[float, ...] = (0.2, 0.1, 0.05, 0.02)
    batch: int = 256
    optimizer: str = "sgd"
    alpha: float = 0.3
    threads: int = 1
    updates: int = 9
    parts: bool = False
    out: Path = field(default_factory=lambda: Path("bench/results") / machine())


DELTA_T = 5


@dataclass(frozen=True)
class Row:
    """One measurement; medians in milliseconds.

    Attributes:
        step, topology, after: an ordinary step, a topology batch, the step after it.
        growth: the growth pass, alone.
        dense: the dense weight gradient, alone.
        growth_ratio: growth over dense.
        update_steps: what a topology batch takes longer than a step, in steps.
        dense_steps: the dense weight gradient in steps: no exact update can cost less.
        after_ratio: the step after an update over an ordinary one.
        parts: of an update, if asked for.
    """

    size: int
    density: float
    step: float
    topology: float
    after: float
    growth: float
    dense: float
    growth_ratio: float
    update_steps: float
    dense_steps: float
    after_ratio: float
    parts: dict[str, float]


class Clock:
    """Sums up the time spent in functions, by name. Inner calls count for the outer one, too."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def watch(self, places: list[tuple[Any, str]]) -> Iterator[None]:
        """Functions as (where they are looked up, name)."""
        before = [(owner, name, getattr(owner, name)) for owner, name in places]
        for owner, name, function in before:
            setattr(owner, name, self._timed(name, function))
        try:
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)

    def _timed(self, name: str, function: Any) -> Any:
        @functools.wraps(function, updated=())
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start

        return timed


class Training:
    """One layer under RigL, on a few batches in turn: new gradients at every update."""

    def __init__(self, size: int, density: float, config: Config) -> None:
        model = rigl.sparsify(
            nn.Sequential(nn.Linear(size, size)),
            sparsity=1 - density,
            distribution="uniform",
            dense_first=False,
        )
        self.layer = model[0]
        make: Any = {
            "sgd": functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
            "adamw": functools.partial(torch.optim.AdamW, lr=1e-3),
        }[config.optimizer]
        self.optimizer = make(model.parameters())
        self.updater = rigl.RigL(
            model, self.optimizer, t_end=10**9, delta_t=DELTA_T, alpha=config.alpha, schedule="constant",
            begin=DELTA_T, grad_accumulation=1,
        )  # fmt: skip
        self.batches = [
            (torch.randn(config.batch, size, requires_grad=True), torch.randn(config.batch, size))
            for _ in range(3)
        ]
        self.turn = 0

    def step(self) -> float:
        """Seconds of a whole step."""
        self.turn += 1
        x, dy = self.batches[self.turn % len(self.batches)]
        x.grad = None
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.layer(x).backward(dy)
        self.optimizer.step()
        return time.perf_counter() - start


def seconds(call: Any) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(size: int, density: float, config: Config) -> Row:
    """Time one layer."""
    torch.manual_seed(0)
    training = Training(size, density, config)
    topology = training.layer.topology
    k = int(config.alpha * topology.n_blocks)
    times: dict[str, list[float]] = defaultdict(list)
    kind = "step"
    for cycle in range(config.updates + 2):
        found: dict[str, list[float]] = defaultdict(list)
        for _ in range(DELTA_T + 1):
            took = training.step()
            kind = "topology" if training.updater.updated else "after" if kind == "topology" else "step"
            found[kind].append(took)
        x, dy = (t.detach() for t in training.batches[cycle % 3])
        for _ in range(3):
            found["dense"].append(seconds(lambda x=x, dy=dy: torch.mm(dy.t(), x)))
            found["growth"].append(seconds(lambda x=x, dy=dy: GrowthScorer(topology, k).observe(x, dy)))
        if cycle >= 2:  # the first ones find cold caches and no guess
            for name, some in found.items():
                times[name] += some
    t = {name: 1e3 * statistics.median(some) for name, some in times.items()}
    extra = t["topology"] - t["step"]
    return Row(
        size, density, t["step"], t["topology"], t["after"], t["growth"], t["dense"],
        t["growth"] / t["dense"], extra / t["step"], t["dense"] / t["step"], t["after"] / t["step"],
        parts(training, config) if config.parts else {},
    )  # fmt: skip


def parts(training: Training, config: Config) -> dict[str, float]:
    """Milliseconds of the parts of an update, by the functions that do them."""
    from rigl import methods, optimizer_state, updater

    places = [
        (GrowthScorer, "_score"), (torch, "addmm"), (_ops, "growth_scan"), (_ops, "growth_best"),
        (_ops, "growth_screen"), (updater.TopologyUpdater, "_update"), (updater, "weakest"),
        (methods, "exchange"), (_ops, "index_update"),
        (optimizer_state, "reordered"), (updater.HostUpdate, "apply"),
    ]  # fmt: skip
    clock, updates = Clock(), 0
    with clock.watch(places):
        for _ in range(config.updates * (DELTA_T + 1)):
            training.step()
            updates += training.updater.updated
    return {name: 1e3 * total / updates for name, total in clock.seconds.items()}


def write(config: Config, rows: list[Row]) -> Path:
    """The JSON file: rows and the conditions they were measured under."""
    conditions = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "torch": torch.__version__,
        "cpu": machine(),
        "isa": _ops.cpu_isa(),
        "threads": config.threads,
        "batch": config.batch,
        "optimizer": config.optimizer,
        "alpha": config.alpha,
    }
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / f"update-{config.optimizer}-{config.threads}t.json"
    fresh = path.with_suffix(".tmp")
    fresh.write_text(
        json.dumps({"conditions": conditions, "rows": [asdict(r) for r in rows]}, indent=1) + "\n"
    )
    fresh.replace(path)
    return path


def main(config: Config) -> int:
    """Measure all layers, print the table, write the file."""
    from rich.console import Console
    from rich.table import Table

    torch.set_num_threads(config.threads)
    title = f"topology updates, batch {config.batch}, {config.optimizer}, {config.threads} thread(s)"
    table = Table(title=f"{title}, {_ops.cpu_isa()}, torch {torch.__version__}")
    names = (
        "step ms",
        "topology ms",
        "after",
        "dense dW ms",
        "growth ms",
        "ratio",
        "dense/step",
        "update/step",
    )
    for column in ("layer", "sparsity", *names):
        table.add_column(column, justify="right", no_wrap=True)
    rows = []
    for size in config.sizes:
        for density in config.densities:
            row = measure(size, density, config)
            rows.append(row)
            print(f"{size} at {1 - density:.0%}: {row.update_steps:.2f} steps", file=sys.stderr, flush=True)
            for name, ms in row.parts.items():
                print(f"  {name:16} {ms:8.3f} ms", file=sys.stderr, flush=True)
            figures = (row.step, row.topology, row.after_ratio, row.dense, row.growth, row.growth_ratio)
            table.add_row(
                f"{size}x{size}",
                f"{1 - density:.0%}",
                *(f"{figure:.2f}" for figure in figures),
                f"{row.dense_steps:.2f}",
                f"{row.update_steps:.2f}",
            )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    print(f"written to {write(config, rows)}")
    return 0


if __name__ == "__main__":
    import tyro

    raise SystemExit(main(tyro.cli(Config)))
