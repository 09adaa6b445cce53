"""Times sparse layers against dense ones, forward and backward, and writes a table and a JSON file.

    python -m bench.run                                # linear, one thread
    python -m bench.run --suite conv2d --threads 2
    python -m bench.run --densities 0.1 --block-size 16

Every result is checked against masked dense before it is timed. A speed-up is the dense layer's median
over ours, in the same process, turn by turn; for conv the better dense memory format counts.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_kernels import _ops
from sparse_kernels.testing import assert_normwise

from .registry import DENSITIES, SUITES, Case
from .timing import Step, Times, interleaved


@dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
        suite: "linear" or "conv2d".
        densities: fractions of active weights.
        block_size: 1 for single weights (CSR), else the side of a block (BSR).
        threads: torch's thread count, for all rivals.
        repeats: timed turns of each, five calls a turn.
        out: folder of the JSON file.
    """

    suite: str = "linear"
    densities: tuple[float, ...] = DENSITIES
    block_size: int = 1
    threads: int = 1
    repeats: int = 10
    out: Path = field(default_factory=lambda: Path("bench/results") / machine())


@dataclass(frozen=True)
class Row:
    """One measurement; times in milliseconds, speed-ups as dense over sparse."""

    case: str
    density: float
    rival: str
    dense_forward_ms: float
    dense_backward_ms: float
    forward_ms: float
    backward_ms: float
    forward_speedup: float
    backward_speedup: float
    speedup: float
    gflops: float
    spread: float


def machine() -> str:
    """The processor's name as a folder name."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":")[1] if lines else name
    return "-".join("".join(c if c.isalnum() else " " for c in name).lower().split())


def training_step(module: nn.Module, x: Tensor, dy: Tensor) -> list[Step]:
    """Forward and backward of one layer, all three products, as two phases."""
    x = x.detach().requires_grad_()
    kept: list[Tensor] = []

    def forward() -> None:
        x.grad = None
        module.zero_grad()
        kept[:] = [module(x)]

    return [forward, lambda: kept[0].backward(dy)]


def check(case: Case, density: float, block_size: int) -> None:
    """Raise if the layer is wrong: a wrong result is not worth timing."""
    layer = case.sparse(density, block_size)
    twin = layer.to_dense()
    x = torch.randn(case.input_shape)
    dy = torch.randn_like(twin(x))
    for module in (layer, twin):
        for phase in training_step(module, x, dy):
            phase()
    assert_normwise(layer(x), twin(x), name=f"{case.name}, output")
    assert_normwise(
        layer.topology.to_dense(layer.values.grad),
        twin.weight.grad * layer.mask(),
        name=f"{case.name}, gradient",
    )


def measure(case: Case, density: float, config: Config) -> Row:
    """Check, then time one layer against its dense rivals."""
    check(case, density, config.block_size)
    rivals = case.rivals()
    x = next(iter(rivals.values()))[1]
    layer = case.sparse(density, config.block_size)
    dy = torch.randn_like(layer(x))
    phases = {name: training_step(module, data, dy) for name, (module, data) in rivals.items()}
    times = interleaved({**phases, "sparse": training_step(layer, x, dy)}, config.repeats)
    ours = times.pop("sparse")
    best = min(times, key=lambda name: _total(times[name]))
    theirs = times[best]
    f, b = (t.median * 1e3 for t in ours)
    df, db = (t.median * 1e3 for t in theirs)
    return Row(
        case=case.name,
        density=density,
        rival=best,
        dense_forward_ms=df,
        dense_backward_ms=db,
        forward_ms=f,
        backward_ms=b,
        forward_speedup=df / f,
        backward_speedup=db / b,
        speedup=(df + db) / (f + b),
        gflops=6 * case.multiply_adds * layer.density / (f + b) / 1e6,
        spread=max(t.spread for t in (*ours, *theirs)),
    )


def _total(phases: list[Times]) -> float:
    return sum(t.median for t in phases)


def write(config: Config, rows: list[Row]) -> Path:
    """The JSON file: rows and the conditions they were measured under."""
    conditions = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": machine(),
        "isa": _ops.cpu_isa(),
        "threads": config.threads,
        "load": os.getloadavg()[0],
        "block_size": config.block_size,
    }
    config.out.mkdir(parents=True, exist_ok=True)
    kind = "csr" if config.block_size == 1 else f"bsr{config.block_size}"
    path = config.out / f"{config.suite}-{kind}-{config.threads}t.json"
    fresh = path.with_suffix(".tmp")
    fresh.write_text(
        json.dumps({"conditions": conditions, "rows": [asdict(r) for r in rows]}, indent=1) + "\n"
    )
    fresh.replace(path)
    return path


def main(config: Config) -> int:
    """Measure a suite, print the table, write the file."""
    from rich.console import Console
    from rich.table import Table

    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    kind = "CSR" if config.block_size == 1 else f"BSR {config.block_size}x{config.block_size}"
    title = f"{config.suite}, {kind}, {config.threads} thread(s), {_ops.cpu_isa()}, torch {torch.__version__}"
    table = Table(title=title)
    for column in (
        "layer",
        "sparsity",
        "dense ms",
        "ours ms",
        "forward",
        "backward",
        "speed-up",
        "GF/s",
        "spread",
    ):
        table.add_column(column, justify="left" if column == "layer" else "right", no_wrap=True)
    rows = []
    for case in SUITES[config.suite]:
        for density in config.densities:
            row = measure(case, density, config)
            rows.append(row)
            print(f"{row.case} at {1 - density:.0%}: {row.speedup:.2f}x", file=sys.stderr, flush=True)
            table.add_row(
                row.case,
                f"{1 - density:.0%}",
                f"{row.dense_forward_ms + row.dense_backward_ms:.2f}",
                f"{row.forward_ms + row.backward_ms:.2f}",
                f"{row.forward_speedup:.2f}x",
                f"{row.backward_speedup:.2f}x",
                f"{row.speedup:.2f}x",
                f"{row.gflops:.0f}",
                f"{row.spread:.0%}",
            )
    Console(width=max(124, Console().width)).print(table)
    print(f"written to {write(config, rows)}")
    return 0


if __name__ == "__main__":
    import tyro

    raise SystemExit(main(tyro.cli(Config, description=__doc__)))
