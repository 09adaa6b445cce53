"""The growth pass against a dense weight gradient, and a whole topology update in ordinary steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import update
from bench.measure import Row
from sparse_kernels import _ops

SIZES, DENSITIES = (1024, 2048, 4096), (0.1, 0.02)


def _param(size: int, density: float) -> Any:
    marks = [pytest.mark.smoke] if size < 100 else [pytest.mark.quick] if size == 1024 else []
    return pytest.param(size, density, id=f"{size}-s{round(100 * (1 - density))}", marks=marks)


@pytest.mark.parametrize(
    ("size", "density"), [_param(size, d) for size in SIZES for d in DENSITIES] + [_param(64, 0.2)]
)
def test_update(size: int, density: float, board: Any, budget: float) -> None:
    """No rival: dense training has no topology. `bench.update` has more (optimizers, parts)."""
    updates = 9 if budget > 1 else 5 if budget > 0.1 else 1
    found = update.measure(size, density, update.Config(updates=updates, threads=torch.get_num_threads()))
    board.add(
        [
            Row(
                "topology",
                f"256 x {size} -> {size}",
                "CSR",
                density,
                "update",
                found.topology - found.step,
                "dense dW",
                found.dense,
                found.dense / (found.topology - found.step),
                0.0,
                torch.get_num_threads(),
                _ops.cpu_isa(),
                "growth",
                extra={
                    "step ms": found.step,
                    "growth / dense dW": found.growth_ratio,
                    "update / step": found.update_steps,
                    "dense dW / step": found.dense_steps,
                    "next step / step": found.after_ratio,
                },
            )
        ]
    )
