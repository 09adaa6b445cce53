"""Times layers of one kind and format against dense ones and other sparse ones, and prints a table.

    python -m bench.run                                # linear, one thread
    python -m bench.run --suite conv2d --threads 2
    python -m bench.run --densities 0.1 --block-size 16 --cases 1024

A quick look at some layers. All suites, with whole training steps and verdicts: `make bench`, or
`pytest bench/suites --help`; the measuring is the same (measure.py).

Every result is checked against masked dense before it is timed. A speed-up is the dense layer's time over
ours, in the same process, turn by turn; for conv the better dense memory format counts.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from . import report
from .measure import Row, measure
from .registry import DENSITIES, SUITES
from .report import machine

__all__ = ["Config", "machine", "main"]


@dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
        suite: "linear" or "conv2d".
        densities: fractions of active weights.
        block_size: 1 for single weights (CSR), else the side of a block (BSR).
        cases: only layers with this in their name.
        threads: torch's thread count, for all rivals.
        budget: seconds for the timed turns of one layer.
        peers: also time the other sparse layers: torch.sparse, and SparseLab and SparseProp if installed.
        out: folder of the JSON, CSV and PNG files; none if empty.
        add: keep the rows of the files there that were not measured again.
    """

    suite: str = "linear"
    densities: tuple[float, ...] = DENSITIES
    block_size: int = 1
    cases: str = ""
    threads: int = 1
    budget: float = 1.5
    peers: bool = True
    out: Path = Path("runs/bench")
    add: bool = False


def main(config: Config) -> int:
    """Measure, print the table, write the files."""
    torch.set_num_threads(config.threads)
    rows: list[Row] = []
    for case in SUITES[config.suite]:
        if config.cases not in case.name:
            continue
        for density in config.densities:
            found = measure(
                case, density, config.block_size, suite=config.suite, budget=config.budget, peers=config.peers
            )
            rows += found
            print(report.line(found[-1]), file=sys.stderr, flush=True)
    report.show(rows)
    for path in report.write(rows, config.out, config.add):
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    import tyro

    raise SystemExit(main(tyro.cli(Config, description=__doc__)))
