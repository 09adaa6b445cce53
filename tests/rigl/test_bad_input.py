"""What cannot work is refused when the updater is built, with the way out in the message."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rigl
from sparse_kernels import SparseLinear


def pair() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(SparseLinear(8, 8, density=0.5))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("method", [rigl.RigL, rigl.SET, rigl.Static])
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"t_end": 0}, ValueError, "t_end must be greater than begin = 0, got 0"),
        ({"begin": 10, "t_end": 10}, ValueError, "t_end must be greater than begin = 10, got 10"),
        ({"t_end": 10.0}, TypeError, "t_end must be an int"),
        ({"delta_t": 0}, ValueError, "delta_t"),
        ({"alpha": 1.5}, ValueError, r"alpha must be a fraction in \[0, 1\], got 1.5"),
        ({"schedule": "cos"}, ValueError, "schedule must be one of cosine, constant"),
        ({"schedule": None}, TypeError, "schedule"),
        ({"power": -1}, ValueError, "power"),
        ({"block_score": "max"}, ValueError, '"l1" or "l2", got \'max\''),
        ({"seed": "a"}, TypeError, "seed must be an int"),
        ({"grad_accumulation": 0}, ValueError, "grad_accumulation"),
    ],
)
def test_settings(method: type, kwargs: dict, error: type[Exception], message: str) -> None:
    model, optimizer = pair()
    with pytest.raises(error, match=message):
        method(model, optimizer, **{"t_end": 100, **kwargs})
    method(model, optimizer, t_end=100)  # the failure left nothing attached


def test_optimizer_built_before_sparsify() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rigl.sparsify(model, sparsity=0.5)
    with pytest.raises(
        ValueError, match=r"layer '0' \(2 of 2 layers\): build the optimizer after rigl.sparsify"
    ):
        rigl.RigL(model, optimizer, t_end=10)


def test_objects() -> None:
    model, optimizer = pair()
    with pytest.raises(TypeError, match="nn.Module, got str"):
        rigl.RigL("model", optimizer, t_end=10)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="torch.optim.Optimizer, got Sequential"):
        rigl.RigL(model, model, t_end=10)  # type: ignore[arg-type]
    dense = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="no sparse layer.*rigl.sparsify"):
        rigl.RigL(dense, torch.optim.SGD(dense.parameters(), lr=0.1), t_end=10)


def test_a_second_method_on_one_optimizer() -> None:
    model, optimizer = pair()
    rigl.RigL(model, optimizer, t_end=10)
    with pytest.raises(ValueError, match="RigL is attached to this optimizer already.*remove"):
        rigl.SET(model, optimizer, t_end=10)
