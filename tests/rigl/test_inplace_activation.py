"""An in-place activation right behind a sparse layer, topology batches included."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rigl

FIRST = torch.contiguous_format


@pytest.mark.parametrize(
    ("first", "last", "shape", "layout"),
    [
        (nn.Linear(16, 32), nn.Linear(32, 4), (8, 16), FIRST),
        (nn.Linear(16, 32), nn.Linear(32, 4), (2, 4, 16), FIRST),
        (nn.Conv2d(16, 32, 3), nn.Conv2d(32, 4, 3), (8, 16, 7, 7), FIRST),
        (nn.Conv2d(16, 32, 3), nn.Conv2d(32, 4, 3), (16, 7, 7), FIRST),
        (nn.Conv2d(16, 32, 3), nn.Conv2d(32, 4, 1), (8, 16, 7, 7), torch.channels_last),
    ],
)
def test_trains_as_with_an_ordinary_one(
    first: nn.Module, last: nn.Module, shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    plain = rigl.sparsify(nn.Sequential(copy.deepcopy(first), nn.ReLU(), copy.deepcopy(last)), sparsity=0.5)
    inplace = copy.deepcopy(plain)
    inplace[1] = nn.ReLU(inplace=True)
    data = [torch.randn(shape).contiguous(memory_format=layout) for _ in range(5)]
    for model in (plain, inplace):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        method = rigl.RigL(model, optimizer, t_end=10, delta_t=2)
        for x in data:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        assert method.updates == 2
    for (name, a), (_, b) in zip(plain.state_dict().items(), inplace.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
