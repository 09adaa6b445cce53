"""Whole training steps of networks, RigL's updates in them."""

from __future__ import annotations

from typing import Any

import pytest

from bench.models import MODELS, measure_model
from bench.registry import DENSITIES


def _param(name: str, density: float) -> Any:
    marks = [pytest.mark.smoke] if "tiny" in name else []
    if (name, density) == ("mlp", 0.1):
        marks.append(pytest.mark.quick)
    return pytest.param(name, density, id=f"{name}-s{round(100 * (1 - density))}", marks=marks)


@pytest.mark.parametrize(
    ("name", "density"), [_param(name, density) for name in MODELS for density in DENSITIES]
)
def test_step(name: str, density: float, board: Any, start: Any, budget: float, peers: bool) -> None:
    board.add([measure_model(MODELS[name], density, budget=4 * budget, peers=peers, start=start)])
