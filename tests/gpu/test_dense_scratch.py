"""The scatter and sample kernels of backend "dense", against plain torch."""

from __future__ import annotations

import pytest
import torch
from product_cases import gpu_topology

from sparse_kernels import dense, testing
from sparse_kernels.triton import densify


@pytest.mark.parametrize("block", [(1, 1), (16, 16), (2, 64), (128, 128)])
@pytest.mark.parametrize("pattern", ["uniform", "none", "all", "empty_rows", "last"])
@pytest.mark.parametrize("kernel", [(), (3, 2)])
def test_scatter_and_sample(
    block: tuple[int, int], pattern: str, kernel: tuple[int, ...], device: str
) -> None:
    shape = (
        (3 * block[0], 2 * block[1], *kernel)
        if block != (1, 1)
        else (17, 1100 // (6 if kernel else 1), *kernel)
    )
    topology = gpu_topology(testing.random_topology(shape, pattern, 0.4, block), device)
    values = torch.randn(topology.values_shape, device=device)
    weight = dense._weight(topology.index, values.shape, topology.rows, topology.cols, 1, list(kernel))
    found = torch.full(shape, float("nan"), device=device)
    densify.scatter(values, found, weight.row_ptr, weight.col_idx, weight.slot, weight.taps)
    assert torch.equal(found, topology.to_dense(values))
    assert torch.equal(dense.scatter(values, weight), found)

    gradient = torch.randn(shape, device=device)
    sampled = torch.full_like(values, float("nan"))
    middle = topology.rows // 2
    for begin, end in ((0, middle), (middle, topology.rows)):
        stripe = gradient[begin * block[0] : end * block[0]]
        densify.sample(stripe, sampled, weight.row_ptr, weight.col_idx, weight.slot, weight.taps, begin, end)
    assert torch.equal(sampled, topology.gather(gradient))
