"""Construction, conversions and copies of a Topology against definitions by entry."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch

from sparse_kernels import Topology, testing
from sparse_kernels.positions import active_count, normalize_block_size


def random_topologies(count):
    for seed in range(count):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        block = (
            (1, 1) if rng.random() < 0.4 else rng.choice(((2, 2), (3, 3), (4, 2), (1, 8), (16, 1), (8, 8)))
        )
        rows, cols = (
            rng.choice((0, 1, rng.randint(2, 12), rng.randint(2, 130 // max(block)))) for _ in range(2)
        )
        groups, kernel = 1, ()
        if rng.random() < 0.4:
            groups, kernel = rng.choice((1, 1, 2)), rng.choice(((1, 1), (3, 3), (2, 5)))
        shape = (groups * rows * block[0], cols * block[1], *kernel)
        pattern = rng.choice(testing.PATTERNS)
        topology = testing.random_topology(
            shape, pattern, rng.choice((0.01, 0.1, 0.5)), block, groups, generator
        )
        yield topology, generator, f"seed {seed}: {topology} {pattern}"


def blocks_by_definition(topology):
    """The slice of the dense weight behind every active block, in value order."""
    b_out, b_in = topology.block_size
    for position in topology.positions().tolist():
        row, col = divmod(position, topology.cols)
        inner, tap = divmod(col, topology.taps)
        place = (slice(row * b_out, (row + 1) * b_out), slice(inner * b_in, (inner + 1) * b_in))
        yield place if len(topology.shape) == 2 else (*place, *divmod(tap, topology.shape[3]))


def test_conversions_follow_the_definition():
    for topology, generator, label in random_topologies(300):
        weight = torch.randn(topology.shape, generator=generator, dtype=torch.float64)
        values = topology.gather(weight)
        assert values.shape == (
            (topology.nnz,) if topology.block_size == (1, 1) else (topology.n_blocks, *topology.block_size)
        )
        rebuilt, mask = torch.zeros_like(weight), torch.zeros(topology.shape, dtype=torch.bool)
        for i, place in enumerate(blocks_by_definition(topology)):
            assert torch.equal(values[i], weight[place].squeeze() if values.dim() == 1 else weight[place]), (
                label
            )
            rebuilt[place], mask[place] = weight[place], True
        assert torch.equal(topology.to_dense(values), rebuilt), label
        assert torch.equal(topology.mask(), mask), label
        assert int(mask.sum()) == topology.nnz, label
        again = Topology.from_mask(mask, topology.block_size, topology.groups)
        assert torch.equal(again.index, topology.index), label
        topology.validate()


def test_index_arrays_are_each_others_transpose():
    for topology, _, label in random_topologies(300):
        per_group = max(1, topology.rows // topology.groups)
        entries = [divmod(p, topology.cols) for p in topology.positions().tolist()]
        columns = [(r // per_group * topology.cols + c, r) for r, c in entries]
        order = sorted(range(len(columns)), key=columns.__getitem__)
        assert topology.perm.tolist() == order, label
        assert topology.row_idx.tolist() == [entries[i][0] for i in order], label
        counts = torch.bincount(
            torch.tensor([c for c, _ in columns], dtype=torch.int64),
            minlength=topology.groups * topology.cols,
        )
        assert topology.col_ptr.diff().tolist() == counts.tolist(), label
        assert topology.index.dtype == torch.int32


def test_to_dense_is_differentiable():
    for topology, generator, label in random_topologies(40):
        values = topology.gather(torch.randn(topology.shape, generator=generator)).requires_grad_()
        weight = torch.randn(topology.shape, generator=generator)
        (topology.to_dense(values) * weight).sum().backward()
        assert torch.equal(values.grad, topology.gather(weight)), label


@pytest.mark.parametrize(
    ("total", "density", "count"),
    [(1000, 0.1, 100), (1000, 0.2, 200), (1000, 0.3, 300), (10, 0.7, 7), (7, 0.5, 4), (3, 0.01, 1),
     (0, 0.5, 0), (5, 0.0, 0), (5, 1.0, 5), (5, 1, 5), (10**9, 0.1, 10**8), (784 * 300, 0.05, 11760),
     (49, 1 - 0.9, 5), (100, 0.001, 1)],
)  # fmt: skip
def test_density_counts_are_exact(total, density, count):
    assert active_count(total, density) == count


def test_random_positions_are_uniform():
    """Every position about equally often: 3,000 draws of 3 of 20, five standard deviations."""
    generator = torch.Generator().manual_seed(0)
    for density in (0.15, 0.6):
        hits = torch.zeros(20)
        for _ in range(3000):
            hits[Topology.random((4, 5), density, generator=generator).positions()] += 1
        expected = 3000 * density
        assert bool(((hits - expected).abs() < 5 * (expected * (1 - density)) ** 0.5).all()), hits


def test_the_same_generator_gives_the_same_topology():
    first, second = (
        Topology.random((40, 50), 0.07, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first.index, second.index)


@pytest.mark.parametrize("block_size", [1, (4, 2)])
def test_copies_are_equal_and_independent(block_size):
    topology = Topology.random((24, 36), 0.2, block_size, generator=torch.Generator().manual_seed(0))
    topology.growth_guess = torch.tensor(1.0)
    for other in (copy.deepcopy(topology), copy.copy(topology).clone(), pickle.loads(pickle.dumps(topology))):
        assert torch.equal(other.index, topology.index)
        assert other.index.data_ptr() != topology.index.data_ptr()
        assert repr(other) == repr(topology)
        assert other.growth_guess is None
        other.validate()
        address = other.row_ptr.data_ptr()
        free = next(p for p in range(other.rows * other.cols) if p not in set(other.positions().tolist()))
        other.update_(torch.tensor([0]), torch.tensor([free]))
        other.validate()
        assert other.row_ptr.data_ptr() == address, "the arrays are no longer views of the index"
        assert not torch.equal(other.index, topology.index)
        topology.validate()


def test_a_dense_size_beyond_memory_is_no_obstacle():
    """0.00001 % of 10^12 positions: drawing and building must not touch the dense size."""
    topology = Topology.random((1_000_000, 1_000_000), 1e-7, generator=torch.Generator().manual_seed(0))
    assert topology.nnz == 100_000
    topology.validate()


@pytest.mark.parametrize("broken", ["row_ptr", "col_idx", "col_ptr", "row_idx", "perm"])
def test_validate_names_the_broken_array(broken):
    for shape, block_size in (((12, 16), 1), ((12, 16), 2), ((12, 4, 2, 2), 1)):
        topology = Topology.random(shape, 0.4, block_size, generator=torch.Generator().manual_seed(1))
        if broken in ("row_idx", "perm") and shape == (12, 16) and block_size == 1:
            continue  # not stored there
        array = getattr(topology, broken)
        array[array.numel() // 2] += 1
        # Row pointers and columns cannot be told apart: a shifted pointer is also a wrong order of columns.
        with pytest.raises(
            ValueError, match="row_ptr|col_idx" if broken in ("row_ptr", "col_idx") else broken
        ):
            topology.validate()


def test_validate_checks_the_kernel_schedule():
    topology = Topology.random((40, 300), 0.3, generator=torch.Generator().manual_seed(1))
    topology.index[-1] += 1
    with pytest.raises(ValueError, match="schedule"):
        topology.validate()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((10, 12), 0.5, 4), "does not divide the out dimension 10; sizes that fit: 1, 2"),
        (((12, 10), 0.5, 4), "does not divide the in dimension 10; sizes that fit: 1, 2"),
        (((12, 8, 3, 3), 0.5, (4, 4), 2), "out dimension 6 per group; sizes that fit: 1, 2"),
        (((12, 8), 0.5, 0), "block_size"),
        (((12, 8), 0.5, (2, 2, 2)), "block_size"),
        (((12, 8), 0.5, True), "block_size"),
        (((12, 8), -0.1), r"density must be a number in \[0, 1\], got -0.1"),
        (((12, 8), 1.1), "density"),
        (((12, 8), float("nan")), "density"),
        (((12, 8), "0.5"), "density"),
        (((12,), 0.5), "shape"),
        (((12, -8), 0.5), "shape"),
        (((12, 8, 3, 3), 0.5, 1, 5), "groups"),
        (((12, 8, 3, 3), 0.5, 1, 0), "groups"),
        (((2**31, 1), 0.0), "int32"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Topology.random(*arguments)


def test_block_sizes_are_normalised():
    assert normalize_block_size(4) == (4, 4)
    assert normalize_block_size((1, 8)) == (1, 8)


def test_a_weight_of_another_shape_is_refused():
    topology = Topology.random((4, 6), 0.5)
    with pytest.raises(ValueError, match=r"expected a dense weight of shape \(4, 6\), got \(6, 4\)"):
        topology.gather(torch.zeros(6, 4))
