"""Scatter of values into rows of a dense weight, and sampling of its gradient, on the CPU."""

from __future__ import annotations

import pytest
import torch

from sparse_kernels import _ops, dense, testing

SHAPES = [(), (3, 2)]  # kernels: Linear, Conv2d
KINDS = [torch.float32, torch.float64, torch.bfloat16]


def example(block, kernel, pattern, groups=1, dtype=torch.float32):
    shape = (4 * block[0], 6 * block[1], *kernel)
    topology = testing.random_topology(shape, pattern, 0.4, block, groups)
    values = torch.randn(topology.values_shape, dtype=dtype)
    weight = dense._weight(
        topology.index, values.shape, topology.rows, topology.cols, groups, list(kernel) or None
    )
    return topology, values, weight


@pytest.mark.parametrize("block", [(1, 1), (4, 4), (2, 5)])
@pytest.mark.parametrize("pattern", ["uniform", "none", "all", "empty_rows", "last"])
@pytest.mark.parametrize("kernel", SHAPES)
def test_there_and_back(block, pattern, kernel):
    topology, values, weight = example(block, kernel, pattern, groups=2 if kernel else 1)
    with testing.poisoned_memory():
        assert torch.equal(dense.scatter(values, weight), topology.to_dense(values))
        gradient = torch.randn(topology.shape)
        b_out = block[0]
        found = dense.sample(
            lambda begin, end: gradient[begin * b_out : end * b_out], list(values.shape), weight, "cpu"
        )
    assert torch.equal(found, topology.gather(gradient))


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("block", [(1, 1), (2, 3)])
def test_stripes_are_the_rows_they_say(dtype, block):
    topology, values, weight = example(block, (), "uniform", dtype=dtype)
    wanted, sampled = topology.to_dense(values), torch.full_like(values, torch.nan)
    for begin, end in ((0, 1), (1, 4)):
        stripe = torch.full_like(wanted[begin * block[0] : end * block[0]], torch.nan)
        dense._scatter_on_cpu(values, *weight.place, begin, stripe)
        assert torch.equal(stripe, wanted[begin * block[0] : end * block[0]])
        dense._sample_on_cpu(stripe, *weight.place, begin, sampled)
    assert torch.equal(sampled, values)


def test_values_of_moved_blocks_are_found_by_their_slots():
    topology, values, _ = example((2, 2), (), "uniform")
    order = torch.randperm(topology.n_blocks)
    topology.load_arrays_(topology.row_ptr, topology.col_idx, order)
    weight = dense._weight(topology.index, values.shape, topology.rows, topology.cols)
    assert torch.equal(dense.scatter(values, weight), topology.to_dense(values))


def test_a_full_weight_is_its_values():
    topology, values, weight = example((1, 1), (), "all")
    assert dense.scatter(values, weight).data_ptr() == values.data_ptr()
    y = _ops.dense_linear_forward(
        torch.ones(2, 6), values, None, topology.index, topology.rows, topology.cols
    )
    assert y.data_ptr() != values.data_ptr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stripe": torch.empty(3)}, "whole rows"),
        ({"stripe": torch.empty(5 * 6)}, "outside"),
        ({"begin": 3}, "outside"),
        ({"index": torch.zeros(3, dtype=torch.int32)}, "too short"),
        ({"stripe": torch.empty(6, dtype=torch.float64)}, "dtype"),
        ({"taps": 4}, "taps"),
    ],
)
def test_wrong_calls_are_refused(change, message):
    topology, values, _ = example((1, 1), (), "uniform")
    right = {
        "values": values, "index": topology.index, "rows": 4, "cols": 6, "groups": 1, "taps": 1, "begin": 0,
        "stripe": torch.empty(12),
    }  # fmt: skip
    dense._scatter_on_cpu(**right)
    with pytest.raises(RuntimeError, match=message):
        dense._scatter_on_cpu(**(right | change))
