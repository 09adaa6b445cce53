"""In-place updates keep every invariant, whatever the sequence (drill D15, the Topology's part)."""

from __future__ import annotations

import pickle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import sparse_kernels as sk
from sparse_kernels import reorder_, testing

GEOMETRIES = st.sampled_from(
    [
        ((9, 14), 1, 1),
        ((1, 1), 1, 1),
        ((40, 300), 1, 1),  # several column tiles in the kernel schedule
        ((300, 12), 1, 1),
        ((12, 20), (4, 2), 1),
        ((16, 16), 8, 1),
        ((6, 4, 3, 3), 1, 2),
        ((8, 6, 1, 3), (2, 3), 1),
        ((12, 4, 2, 2), 2, 3),
    ]
)


class Updates(RuleBasedStateMachine):
    """A weight, a momentum and an optimizer-like counter follow random updates; a dict is the model."""

    done = 0

    @initialize(
        geometry=GEOMETRIES,
        pattern=st.sampled_from(testing.PATTERNS),
        density=st.sampled_from([0.005, 0.05, 0.3, 0.9]),
        seed=st.integers(0, 2**20),
    )
    def start(self, geometry, pattern, density, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.topology = testing.random_topology(
            geometry[0], pattern, density, *geometry[1:], generator=self.generator
        )
        shape = (self.topology.n_blocks, *self.topology.block_size)
        self.tensors = [torch.randn(shape, generator=self.generator) for _ in range(2)]
        self.tensors[1] += 10
        self.address = self.topology.index.data_ptr()
        self.size = self.topology.n_blocks
        self.model = self.contents()

    def contents(self):
        """Position -> what is stored there."""
        rows = zip(*(t.tolist() for t in self.tensors), strict=True)
        return dict(zip(self.topology.positions().tolist(), rows, strict=True))

    def draw(self, fraction, regrow):
        topology, total = self.topology, self.topology.rows * self.topology.cols
        free = torch.ones(total, dtype=torch.bool)
        free[topology.positions()] = False
        k = min(round(fraction * self.size), self.size if regrow else int(free.sum()))
        drop = torch.randperm(self.size, generator=self.generator)[:k]
        if regrow:
            free[topology.positions()[drop]] = True
        candidates = free.nonzero().flatten()
        grow = candidates[torch.randperm(candidates.numel(), generator=self.generator)[:k]]
        return drop, grow

    @rule(
        fractions=st.lists(st.sampled_from([0.0, 0.01, 0.3, 1.0]), min_size=1, max_size=4),
        regrow=st.booleans(),
    )
    def updates(self, fractions, regrow):
        for fraction in fractions:
            self.update(fraction, regrow)
            self.all_holds()

    def update(self, fraction, regrow):
        drop, grow = self.draw(fraction, regrow)
        before = self.topology.positions()
        source = self.topology.update_(drop, grow)
        for t in self.tensors:
            reorder_(t, source)
        zero = torch.zeros(self.topology.block_size).tolist()
        for position in before[drop].tolist():
            del self.model[position]
        for position in grow.tolist():
            self.model[position] = (zero, zero)
        type(self).done += 1

    @rule(kind=st.sampled_from(["long", "active", "repeated", "range", "drop range", "drop twice"]))
    def refused(self, kind):
        drop, grow = self.draw(0.5, regrow=False)
        if drop.numel() < 2 and kind != "long":
            return
        if kind == "long":
            grow = torch.cat([grow, torch.tensor([0])])
        elif kind == "active":
            kept = torch.ones(self.size, dtype=torch.bool)
            kept[drop] = False
            if not bool(kept.any()):
                return
            grow[0] = self.topology.positions()[kept][0]
        elif kind == "repeated":
            grow[0] = grow[1]
        elif kind == "range":
            grow[0] = self.topology.rows * self.topology.cols
        elif kind == "drop range":
            drop[0] = -1
        else:
            drop[0] = drop[1]
        with pytest.raises(ValueError):
            self.topology.update_(drop, grow)

    @rule()
    def copy(self):
        self.topology.validate()
        self.topology = pickle.loads(pickle.dumps(self.topology))
        self.address = self.topology.index.data_ptr()

    @rule()
    def reload(self):
        other = self.topology.clone()
        self.topology.load_arrays_(other.row_ptr, other.col_idx)

    @invariant()
    def all_holds(self):
        if not hasattr(self, "topology"):
            return
        topology = self.topology
        assert topology.index.data_ptr() == self.address
        assert topology.n_blocks == self.size
        assert topology.index.dtype == torch.int32
        topology.validate()
        positions = topology.positions()
        assert bool((positions.diff() > 0).all())
        assert self.contents() == self.model
        assert sorted(topology.perm.tolist()) == list(range(self.size))


def test_a_thousand_random_updates():
    Updates.done = 0
    run_state_machine_as_test(
        Updates,
        settings=settings(
            max_examples=150,
            stateful_step_count=25,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert Updates.done >= 1000, f"only {Updates.done} updates were made"


@pytest.mark.parametrize("block_size", [1, (2, 4)])
@pytest.mark.parametrize("conv", [False, True])
def test_a_layer_follows_its_topology(block_size, conv):
    """Kept weights stay bit-equal with their momentum, grown ones are zero, nothing moves in memory."""
    generator = torch.Generator().manual_seed(0)
    if conv:
        layer = sk.SparseConv2d(8, 12, 3, density=0.2, block_size=block_size, generator=generator)
        x = torch.randn(2, 8, 6, 6, generator=generator)
    else:
        layer = sk.SparseLinear(24, 20, density=0.2, block_size=block_size, generator=generator)
        x = torch.randn(5, 24, generator=generator)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    values, addresses = layer.values, (layer.values.data_ptr(), layer.topology.index.data_ptr())
    for _ in range(30):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
        momentum = optimizer.state[values]["momentum_buffer"]
        topology = layer.topology
        tensors = (values.data, values.grad, momentum)
        before = topology.positions()
        old = [dict(zip(before.tolist(), t.tolist(), strict=True)) for t in tensors]
        total = topology.rows * topology.cols
        drop = torch.randperm(topology.n_blocks, generator=generator)[:5]
        free = torch.ones(total, dtype=torch.bool)
        free[before] = False
        candidates = free.nonzero().flatten()
        grow = candidates[torch.randperm(candidates.numel(), generator=generator)[:5]]
        source = layer.update_topology(drop, grow)
        reorder_(momentum, source)
        kept = set(before.tolist()) - set(before[drop].tolist())
        for tensor, was in zip(tensors, old, strict=True):
            now = dict(zip(topology.positions().tolist(), tensor.tolist(), strict=True))
            assert all(now[p] == was[p] for p in kept)
            assert all(torch.tensor(now[p]).count_nonzero() == 0 for p in grow.tolist())
        assert set(topology.positions().tolist()) == kept | set(grow.tolist())
        assert layer.values is values
        assert (values.data_ptr(), topology.index.data_ptr()) == addresses
        assert torch.equal(layer(x), layer(x))


def test_reorder_refuses_another_length():
    with pytest.raises(ValueError, match="expected 3 entries"):
        reorder_(torch.zeros(4), torch.tensor([0, 1, 2]))
