"""Linear and Conv2d layers: CSR and blocks, over density; products alone; bfloat16; the break-even region."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.measure import format_name, measure
from bench.registry import BREAK_EVEN, DENSITIES, SUITES, Case

LINEAR, CONV = SUITES["linear"], SUITES["conv2d"]
QUICK = {  # suite, case, block, density
    *(("linear", LINEAR[0].name, block, density) for block in (1, 16) for density in DENSITIES),
    *(("linear", LINEAR[2].name, 1, density) for density in DENSITIES),
    *(("linear", LINEAR[0].name, block, 0.1) for block in (4, 8, 32)),
    *(("linear", LINEAR[1].name, block, 0.1) for block in (1, 16)),
    *(("conv2d", case.name, 1, 0.1) for case in CONV),
    *(("conv2d", CONV[1].name, 16, 0.1),),
}


def _param(suite: str, case: Case, block: int, density: float, *more: Any, name: str = "") -> Any:
    marks = [pytest.mark.smoke] if "tiny" in suite else []
    if (suite, case.name, block, density) in QUICK and not name:
        marks.append(pytest.mark.quick)
    shape = case.name.replace(" -> ", "-").replace(" x ", "-").replace(", ", "-").replace(" ", "")
    ident = f"{format_name(block).replace(' ', '')}-{shape}-s{round(100 * (1 - density))}{name}".lower()
    return pytest.param(suite, case, block, density, *more, id=ident, marks=marks)


def _grid(suite: str, blocks: tuple[int, ...], densities: tuple[float, ...] = DENSITIES) -> list[Any]:
    return [_param(suite, case, b, d) for case in SUITES[suite] for b in blocks for d in densities]


def _run(board: Any, start: Any, budget: float, what: tuple[str, Case, int, float], **more: Any) -> None:
    suite, case, block, density = what
    name = suite.removesuffix("-tiny")
    board.add(measure(case, density, block, suite=name, budget=budget, start=start, **more))


@pytest.mark.parametrize(
    ("suite", "case", "block", "density"),
    [*_grid("linear", (1, 4, 8, 16, 32)), *_grid("linear-tiny", (1, 16), (0.2, 0.5))],
)
def test_linear(
    suite: str, case: Case, block: int, density: float, board: Any, start: Any, budget: float, peers: bool
) -> None:
    _run(board, start, budget, (suite, case, block, density), peers=peers)


@pytest.mark.parametrize(
    ("suite", "case", "block", "density"),
    [*_grid("conv2d", (1, 16)), *_grid("conv2d-tiny", (1, 16), (0.2, 0.5))],
)
def test_conv2d(
    suite: str, case: Case, block: int, density: float, board: Any, start: Any, budget: float, peers: bool
) -> None:
    _run(board, start, budget, (suite, case, block, density), peers=peers)


@pytest.mark.parametrize(
    ("suite", "case", "block", "density", "op"),
    [
        _param(suite, case, block, density, op, name=f"-{op}")
        for suite, case, density in (
            *(("linear", case, d) for case in LINEAR for d in (0.1, 0.02)),
            *(("conv2d", case, 0.1) for case in CONV),
            ("linear-tiny", SUITES["linear-tiny"][0], 0.2),
        )
        for block in (1, 16)
        for op in ("dX", "dW")
    ],
)
def test_products(
    suite: str,
    case: Case,
    block: int,
    density: float,
    op: str,
    board: Any,
    start: Any,
    budget: float,
    peers: bool,
) -> None:
    """One product of the backward alone: the layer below needs no gradient, or the weights are frozen."""
    _run(board, start, min(budget, 0.8), (suite, case, block, density), op=op, peers=peers)


@pytest.mark.parametrize(
    ("suite", "case", "block", "density"),
    [_param("linear", LINEAR[0], 1, density) for density in DENSITIES],
)
def test_bfloat16(
    suite: str, case: Case, block: int, density: float, board: Any, start: Any, budget: float, peers: bool
) -> None:
    _run(board, start, budget, (suite, case, block, density), peers=peers, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("suite", "case", "block", "density"),
    [
        *(_param("linear", case, block, d) for case in LINEAR for block in (1, 16) for d in BREAK_EVEN),
        *(_param("conv2d", case, 1, d) for case in CONV for d in BREAK_EVEN),
    ],
)
def test_break_even(
    suite: str, case: Case, block: int, density: float, board: Any, start: Any, budget: float, peers: bool
) -> None:
    """Where dense starts to win; interpolated at the end of the run (targets.py)."""
    _run(board, start, min(budget, 0.6), (suite, case, block, density), peers=False, kernels=True)
