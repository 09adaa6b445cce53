"""Values of blocks in any order of slots: products, conversions, copies and states agree with those in order.
The layout of a GPU, on CPU tensors: its arrays against their definition.
"""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch

import sparse_kernels as sk
from sparse_kernels import Topology, layout, reorder_, testing
from sparse_kernels.growth import GrowthScorer

GEOMETRIES = (
    ((24, 36), (4, 2), 1),
    ((16, 16), 8, 1),
    ((5, 3), (1, 3), 1),
    ((12, 4, 3, 3), 2, 3),
    ((8, 6, 1, 3), (2, 3), 1),
    ((512, 2), (1, 2), 1),
    ((2, 1200), (2, 1), 1),  # one row, many chunks
)


def topologies(per_geometry=8):
    for seed in range(per_geometry * len(GEOMETRIES)):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        shape, block_size, groups = GEOMETRIES[seed % len(GEOMETRIES)]
        pattern = testing.PATTERNS[seed % len(testing.PATTERNS)]
        density = rng.choice((0.05, 0.3, 0.8))
        topology = testing.random_topology(shape, pattern, density, block_size, groups, generator)
        yield topology, generator, f"seed {seed}: {topology} {pattern}"


def shuffled(topology, generator):
    """The same topology with its values in another order, and what brings values into that order."""
    slot = torch.randperm(topology.n_blocks, generator=generator)
    other = topology.clone()
    other.load_arrays_(topology.row_ptr, topology.col_idx, slot)
    return other, slot.argsort()


def test_conversions_follow_the_slots():
    for topology, generator, label in topologies():
        other, order = shuffled(topology, generator)
        weight = torch.randn(topology.shape, generator=generator)
        values = topology.gather(weight)
        assert torch.equal(other.positions(), topology.positions()[order]), label
        assert torch.equal(other.gather(weight), values[order]), label
        assert torch.equal(other.to_dense(values[order]), topology.to_dense(values)), label
        assert torch.equal(other.mask(), topology.mask()), label
        assert torch.equal(other.perm.long(), other.slot.long()[topology.perm.long()]), label
        other.validate()


def product(x, values, topology, conf):
    if len(topology.shape) == 2:
        return sk.functional.linear(x, values, topology)
    return sk.functional.conv2d(x, values, topology, None, *conf, groups=topology.groups)


@pytest.mark.parametrize("dtype", testing.NATIVE_DTYPES, ids=str)
def test_products_with_moved_slots_are_bitwise_the_same(dtype):
    for topology, generator, label in topologies(4):
        other, order = shuffled(topology, generator)
        channels = topology.shape[1] * topology.groups
        size = (7, channels) if len(topology.shape) == 2 else (3, channels, 6, 5)
        x = torch.randn(size, generator=generator, dtype=dtype, requires_grad=True)
        values = torch.randn(topology.values_shape, generator=generator, dtype=dtype)
        found = []
        for t, v in ((topology, values), (other, values[order])):
            v.requires_grad_()
            y = product(x, v, t, ((2, 1), (1, 0)))
            weights = torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)
            dx, dv = torch.autograd.grad((y * weights).sum(), (x, v))
            found.append((y, dx, dv))
        (y, dx, dv), (y2, dx2, dv2) = found
        assert torch.equal(y, y2), label
        assert torch.equal(dx, dx2), label
        assert torch.equal(dv[order], dv2), label


def test_growth_scores_of_active_blocks_are_in_value_order():
    topology = Topology.random((24, 36), 0.3, (4, 2), generator=torch.Generator().manual_seed(0))
    other, order = shuffled(topology, torch.Generator().manual_seed(1))
    x, dy = torch.randn(5, 36), torch.randn(5, 24)
    growths = []
    for t in (topology, other):
        scorer = GrowthScorer(t, 7)
        scorer.observe(x, dy)
        growths.append(scorer.result())
    assert torch.equal(growths[0].active[order], growths[1].active)
    assert torch.equal(growths[0].positions, growths[1].positions)


def test_an_update_from_any_slots_keeps_what_stays():
    for topology, generator, label in topologies(6):
        other, _ = shuffled(topology, generator)
        total, n = other.rows * other.cols, other.n_blocks
        values = torch.randn(other.values_shape, generator=generator)
        free = torch.ones(total, dtype=torch.bool)
        free[other.positions()] = False
        free = free.nonzero().flatten()
        k = min(n, free.numel(), 5)
        drop = torch.randperm(n, generator=generator)[:k]
        grow = free[torch.randperm(free.numel(), generator=generator)[:k]]
        model = dict(zip(other.positions().tolist(), values.tolist(), strict=True))
        for position in other.positions()[drop].tolist():
            del model[position]
        model |= dict.fromkeys(grow.tolist(), torch.zeros(other.block_size).tolist())
        source = other.update_(drop, grow)
        reorder_(values, source)
        assert dict(zip(other.positions().tolist(), values.tolist(), strict=True)) == model, label
        assert other.slot.tolist() == list(range(n)), label
        other.validate()


# the layout of a GPU --------------------------------------------------------------------------


def test_the_tail_is_what_its_definition_says():
    used = 0
    for topology, _, label in topologies():
        gpu = topology._with_layout("gpu")
        gpu.validate()
        arrays = layout.split(gpu.index, *gpu._grid, gpu=True, b_in=gpu.block_size[1])
        for name in ("row_ptr", "col_idx", "col_ptr", "row_idx", "perm", "slot"):
            assert torch.equal(getattr(arrays, name), getattr(topology, name)), f"{label}: {name}"
        for ptr, order in ((arrays.row_ptr, arrays.row_order), (arrays.col_ptr, arrays.col_order)):
            counts = ptr.diff().tolist()
            assert order.tolist() == sorted(range(len(counts)), key=lambda i: (-counts[i], i)), label
        ptr, n, most = gpu.row_ptr.tolist(), gpu.n_blocks, max(1, 256 // gpu.block_size[1])
        chunks = [(r, b) for r in range(gpu.rows) for b in range(ptr[r], ptr[r + 1], most)]
        used = max(used, len(chunks) - gpu.rows)
        chunks += [(gpu.rows, n)] * (gpu.rows + n // most - len(chunks))
        assert list(zip(arrays.chunk_row.tolist(), arrays.chunk_begin.tolist(), strict=True)) == chunks, label
    assert used > 0  # somewhere a row had several chunks


@pytest.mark.parametrize(("shape", "block_size"), [((12, 20), 1), ((6, 4, 3, 3), 1), ((12, 20), (4, 2))])
def test_a_layout_is_changed_and_changed_back(shape, block_size):
    topology = Topology.random(shape, 0.3, block_size, generator=torch.Generator().manual_seed(0))
    if block_size != 1:
        topology, _ = shuffled(topology, torch.Generator().manual_seed(1))
    gpu = topology._with_layout("gpu")
    gpu.validate()
    assert torch.equal(gpu.positions(), topology.positions())
    assert torch.equal(gpu.perm, topology.perm)
    assert torch.equal(gpu.row_idx, topology.row_idx)
    assert (gpu.index.numel() > topology.index.numel()) == (block_size != 1)
    assert torch.equal(gpu._with_layout("cpu").index, topology.index)
    for twin in (gpu.clone(), pickle.loads(pickle.dumps(gpu)), copy.deepcopy(gpu)):
        assert twin._gpu
        assert torch.equal(twin.index, gpu.index)
        twin.validate()
    old = gpu.positions()
    free = next(p for p in range(gpu.rows * gpu.cols) if p not in set(old.tolist()))
    address, source = gpu.index.data_ptr(), gpu.update_(torch.tensor([3]), torch.tensor([free]))
    assert (gpu.index.data_ptr(), int((source < 0).sum())) == (address, 1)
    assert set(gpu.positions().tolist()) == set(old.tolist()) - {int(old[3])} | {free}
    gpu.validate()


@pytest.mark.parametrize("name", ["slot", "row_order", "col_order", "chunk_row", "chunk_begin"])
def test_validate_names_what_is_broken(name):
    topology = Topology.random((24, 36), 0.4, (4, 2), generator=torch.Generator().manual_seed(1))
    gpu = topology._with_layout("gpu")
    getattr(gpu._arrays, name)[1] += 1
    with pytest.raises(ValueError, match=name):
        gpu.validate()


def test_an_index_of_another_layout_is_refused():
    topology = Topology.random((24, 36), 0.4, (4, 2), generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match="another topology or layout"):
        layout.split(topology.index, *topology._grid, gpu=True, b_in=2)


# states ---------------------------------------------------------------------------------------


def make(seed, block_size=(4, 2)):
    generator = torch.Generator().manual_seed(seed)
    layer = sk.SparseLinear(24, 16, density=0.25, block_size=block_size, generator=generator)
    if block_size != 1:
        layer.topology, order = shuffled(layer.topology, generator)
        layer.values.data = layer.values.data[order]
    return layer


def test_a_state_keeps_values_where_they_stand():
    """An optimizer's state is in value order: a checkpoint must not put the values into another."""
    layer = make(0)
    state = layer.state_dict()
    assert set(state) == {"values", "bias", "row_ptr", "col_idx", "weight_shape", "slot"}
    plain = sk.SparseLinear(24, 16, density=0.25, block_size=(4, 2))
    assert not plain.load_state_dict(state).unexpected_keys
    assert torch.equal(plain.topology.index, layer.topology.index)
    assert torch.equal(plain.values, layer.values)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin.topology.index, layer.topology.index)
    other = sk.SparseLinear(24, 16, density=0.25, block_size=(4, 2))
    layer.load_state_dict(other.state_dict())  # one without slots: in the order of the positions
    assert "slot" not in other.state_dict()
    assert torch.equal(layer.topology.index, other.topology.index)
    assert torch.equal(layer.dense_weight(), other.dense_weight())


def test_hostile_slots_are_refused_and_change_nothing():
    for bad in (
        lambda s: s[:-1],
        lambda s: s.unsqueeze(0),
        lambda s: s.float(),
        lambda s: s.roll(1).clamp_min(1),
        lambda s: torch.where(s == 0, -1, s),
        lambda s: torch.where(s == 3, len(s), s),
        lambda s: torch.where(s == 3, 2**40, s.long()),
        lambda s: "slot",
    ):
        layer = make(0)
        state = {**make(1).state_dict(), "values": torch.full_like(layer.values, 7.0)}
        state["slot"] = bad(state["slot"])
        before = (layer.values.detach().clone(), layer.topology.index.clone())
        with pytest.raises(RuntimeError, match="slot"):
            layer.load_state_dict(state)
        assert torch.equal(layer.values, before[0])
        assert torch.equal(layer.topology.index, before[1])


def test_slots_without_the_rest_or_for_single_weights_are_refused():
    layer = make(0)
    with pytest.raises(RuntimeError, match="slot without values"):
        layer.load_state_dict({"slot": layer.topology.slot}, strict=False)
    single = make(0, block_size=1)
    state = {**single.state_dict(), "slot": torch.arange(single.nnz)}
    with pytest.raises(RuntimeError, match="slot is for blocks"):
        single.load_state_dict(state)
