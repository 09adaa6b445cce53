"""Updates on the device against those on the host: the same drops and grows, with nothing read on the host.

All on CPU tensors in the layout of a GPU.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_kernels import Topology, dense, reference, testing
from sparse_kernels.growth import DeviceGrowth, GrowthScorer
from sparse_kernels.rewiring import plan_rewiring, rewire_

TRUE = torch.tensor(True)


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.sum().item(),
        lambda t: bool(t.any()),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: t.masked_select(t > 0),
        lambda t: t.unique(),
        lambda t: torch.equal(t, t),
        lambda t: t.repeat_interleave(t.long()),
        lambda t: t.index_put_((t > 0,), t[0]),
        lambda t: t.__setitem__(0, 2.0),
    ],
)
def test_the_guard_sees_host_reads(read, no_host_reads):
    with pytest.raises(AssertionError, match="waits for the device"), no_host_reads():
        read(torch.ones(3))


def expected(topology, drop_scores, grid_scores, k):
    """Sets dropped and grown by the definition, what is both taken out."""
    positions, scores = topology.positions().tolist(), drop_scores.tolist()
    dropped = sorted(range(len(positions)), key=lambda i: (scores[i], positions[i]))[:k]
    dropped = {positions[i] for i in dropped}
    kept, grid = set(positions) - dropped, grid_scores.tolist()
    grown = set(sorted((p for p in range(len(grid)) if p not in kept), key=lambda p: (-grid[p], p))[:k])
    return dropped - grown, grown - dropped


def pool_of(topology, grid, k, rng):
    """Growth scores as a scorer has them: all for blocks, the best inactive ones for single weights."""
    if topology.is_bsr:
        return grid[topology.positions()], None, grid.clone()
    best = reference.top_inactive(grid, topology, k)
    scores = grid[best]
    if rng.random() < 0.3:  # places without a candidate, and active ones, which are none
        best = torch.cat([best, topology.positions()[:2], torch.tensor([0])])
        scores = torch.cat([scores, grid[topology.positions()[:2]], torch.tensor([-torch.inf])])
    order = torch.randperm(len(best), generator=torch.Generator().manual_seed(rng.randrange(2**30)))
    return grid[topology.positions()], best[order], scores[order]


GEOMETRIES = (
    ((9, 14), 1, 1),
    ((1, 1), 1, 1),
    ((6, 4, 3, 3), 1, 2),
    ((24, 36), (4, 2), 1),
    ((8, 8), 8, 1),
    ((12, 4, 2, 2), 2, 3),
    ((2, 2400), (2, 1), 1),
)


def score_like(rng, generator, size):
    kind = rng.randrange(4)
    if kind == 0:
        return torch.rand(size, generator=generator)
    if kind == 1:
        return torch.randint(0, 3, (size,), generator=generator).float()
    if kind == 2:
        return torch.full((size,), float(rng.choice((0, 1))))
    return torch.where(torch.rand(size, generator=generator) < 0.5, 0.0, -0.0)


def test_a_chain_of_updates_follows_the_definition(no_host_reads):
    """30 updates each of random topologies: sets, survivors, zeros, invariants, addresses, no host reads."""
    updates = 0
    for seed in range(40):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        shape, block_size, groups = GEOMETRIES[seed % len(GEOMETRIES)]
        pattern = rng.choice(testing.PATTERNS)
        topology = testing.random_topology(
            shape, pattern, rng.choice((0.05, 0.3, 0.8)), block_size, groups, generator
        )
        topology = topology._with_layout("gpu")
        n, total = topology.n_blocks, topology.rows * topology.cols
        if n == 0:
            continue
        address = topology.index.data_ptr()
        tensors = [torch.randn(topology.values_shape, generator=generator) for _ in range(2)]
        tensors.append(torch.randn((n, *([1] * topology.is_bsr)), generator=generator).double())
        for _ in range(30):
            k = rng.choice((0, 1, n, rng.randint(0, n)))
            drops, grid = score_like(rng, generator, n), score_like(rng, generator, total)
            if rng.random() < 0.2:  # NaN in what goes must not stay
                tensors[0][drops.argmin()] = torch.nan
            pool = pool_of(topology, grid, k, rng)
            gone, new = expected(topology, drops, grid, k)
            before = topology.positions()
            model = [dict(zip(before.tolist(), t.clone(), strict=True)) for t in tensors]
            with no_host_reads():
                replaced = rewire_(topology, drops, *pool, rng.choice((k, torch.tensor(k))), TRUE, tensors)
            after = topology.positions()
            assert set(after.tolist()) == set(before.tolist()) - gone | new, f"seed {seed}"
            assert int(replaced) == len(new)
            assert topology.index.data_ptr() == address
            topology.validate()
            for tensor, old in zip(tensors, model, strict=True):
                for p, now in zip(after.tolist(), tensor, strict=True):
                    wanted = torch.zeros_like(now) if p in new else old[p]
                    assert torch.equal(now.nan_to_num(7.5), wanted.nan_to_num(7.5)), f"seed {seed}"
            if topology.is_bsr:  # nothing moved
                kept = [p in set(before.tolist()) for p in after.tolist()]
                assert torch.equal(before[kept], after[kept])
            updates += 1
    assert updates > 600


@pytest.mark.parametrize("block_size", [1, (4, 2)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, None])
def test_without_permission_nothing_changes_bit_for_bit(block_size, bad):
    generator = torch.Generator().manual_seed(0)
    topology = Topology.random((24, 36), 0.3, block_size, generator=generator)._with_layout("gpu")
    n, total = topology.n_blocks, topology.rows * topology.cols
    rng = random.Random(0)
    values = torch.randn(topology.values_shape, generator=generator)
    for allowed in (True, True, False):  # slots are moved by then
        drops, grid = torch.rand(n, generator=generator), torch.rand(total, generator=generator)
        pool = pool_of(topology, grid, 20, rng)
        if not allowed:
            values.view(-1)[::7] = torch.nan
            if bad is not None:
                drops[::3] = bad
                pool[0][::2] = pool[2][::2] = bad
        old = topology.index.clone(), values.clone().view(torch.int32)
        replaced = rewire_(topology, drops, *pool, 20, torch.tensor(allowed), [values])
        assert torch.equal(topology.index, old[0]) != allowed
        assert torch.equal(values.view(torch.int32), old[1]) != allowed
        assert (int(replaced) > 0) == allowed
        topology.validate()


@pytest.mark.parametrize("block_size", [1, 2])
def test_a_plan_changes_nothing_and_may_be_applied_twice(block_size):
    generator = torch.Generator().manual_seed(0)
    topology = Topology.random((12, 16), 0.4, block_size, generator=generator)._with_layout("gpu")
    values, n = torch.randn(topology.values_shape), topology.n_blocks
    pool = pool_of(topology, torch.rand(topology.rows * topology.cols), 5, random.Random(1))
    before = topology.index.clone(), values.clone()
    plan = plan_rewiring(topology, torch.rand(n), *pool, 5, TRUE, [values])
    assert torch.equal(topology.index, before[0])
    assert torch.equal(values, before[1])
    plan.apply_()
    once = topology.index.clone(), values.clone()
    plan.apply_()
    assert torch.equal(topology.index, once[0])
    assert torch.equal(values, once[1])
    assert not torch.equal(once[0], before[0])


def test_what_does_not_fit_is_refused_by_name():
    topology = Topology.random((12, 16), 0.4)
    gpu, n = topology._with_layout("gpu"), topology.n_blocks
    blocks = Topology.random((12, 16), 0.4, 2)._with_layout("gpu")
    drops, best = torch.rand(n), torch.arange(3)
    for arguments, message in (
        ((topology, drops, drops, best, torch.rand(3), 1, TRUE), "layout of a GPU"),
        ((gpu, drops[1:], drops, best, torch.rand(3), 1, TRUE), "drop_scores"),
        ((gpu, drops, drops[1:], best, torch.rand(3), 1, TRUE), "active"),
        ((gpu, drops, drops, best, torch.rand(4), 1, TRUE), "scores"),
        ((gpu, drops, drops, None, torch.rand(4), 1, TRUE), "positions"),
        ((gpu, drops, drops, best, torch.rand(3), 1, TRUE, [torch.rand(n + 1)]), "expected 77 entries"),
        ((blocks, torch.rand(20), drops, best, torch.rand(3), 1, TRUE), "positions"),
        ((blocks, torch.rand(blocks.n_blocks), drops, None, torch.rand(3), 1, TRUE), "scores"),
        ((Topology.random((4, 4), 0.0)._with_layout("gpu"), drops, drops, best, best, 1, TRUE), "no active"),
    ):
        with pytest.raises(ValueError, match=message):
            rewire_(*arguments)


# scores ---------------------------------------------------------------------------------------


@pytest.fixture(params=[None, 300], ids=["one stripe", "many stripes"])
def stripe(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setitem(dense._STRIPE_ELEMENTS, "cpu", request.param)


def observed(topology, pairs, k, block_score="l1", conf=()):
    scorer = GrowthScorer(topology, k, block_score, defer=len(pairs) > 1)
    for x, dy in pairs:
        scorer.observe(x, dy, *conf)
    return scorer.result()


CONF = ((1, 1), (0, 1), (1, 1))


@pytest.mark.parametrize("integers", [True, False])
def test_scores_on_the_device_are_those_on_the_host(stripe, integers, no_host_reads):
    """Integers tie almost everywhere: the candidates are then decided by position."""
    for seed in range(60):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        shape, block_size, groups = GEOMETRIES[seed % len(GEOMETRIES)]
        pattern = testing.PATTERNS[seed % len(testing.PATTERNS)]
        topology = testing.random_topology(shape, pattern, 0.3, block_size, groups, generator)
        if topology.is_bsr:
            slot = torch.randperm(topology.n_blocks, generator=generator)
            topology.load_arrays_(topology.row_ptr, topology.col_idx, slot)
        gpu = topology._with_layout("gpu")
        block_score, k = rng.choice(("l1", "l2")), rng.choice((0, 1, 5, 200))
        pairs, conf = [], ()
        for _ in range(rng.choice((1, 3))):
            x, dy = (torch.randn(4, size, generator=generator) for size in (shape[1] * groups, shape[0]))
            if len(shape) == 4:
                conf = (*CONF, groups)
                x = torch.randn(2, shape[1] * groups, 4, 4, generator=generator)
                dy = torch.randn(2, shape[0], 5 - shape[2], 7 - shape[3], generator=generator)
            pairs.append((x.round(), dy.round()) if integers else (x, dy))
        host = observed(topology, pairs, k, block_score, conf)
        with no_host_reads():
            device = observed(gpu, pairs, k, block_score, conf)
        assert isinstance(device, DeviceGrowth)
        assert bool(device.finite)
        if topology.is_bsr:
            assert device.active is None
            of_active = device.scores[gpu.positions()]
        else:
            of_active = device.active
        if topology.is_bsr and not integers:  # sums of several passes may be taken in another order
            torch.testing.assert_close(of_active, host.active)
            torch.testing.assert_close(device.scores[host.positions], host.scores)
            continue
        assert torch.equal(of_active, host.active), f"seed {seed}: {topology}"
        if topology.is_bsr:
            assert device.positions is None
            assert torch.equal(device.scores[host.positions], host.scores)
            found = reference.top_inactive(device.scores, topology, len(host.positions))
            assert torch.equal(found.sort().values, host.positions), f"seed {seed}: {topology}"
        else:
            positions, order = device.positions.sort()
            assert torch.equal(positions, host.positions), f"seed {seed}: {topology}"
            assert torch.equal(device.scores[order], host.scores)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("block_size", [1, 2])
def test_a_score_that_is_not_finite_is_flagged(bad, block_size, stripe, monkeypatch):
    topology = Topology.random((20, 30), 0.3, block_size)._with_layout("gpu")
    gradient = torch.randn(20, 30)
    monkeypatch.setattr(
        "sparse_kernels.dense.linear_stripe",
        lambda x, dy, t, begin, end: gradient[begin * block_size : end * block_size].clone(),
    )
    for place in (0, 599, 311):
        assert bool(observed(topology, [(torch.ones(1, 30), torch.ones(1, 20))], 5).finite)
        saved = gradient.view(-1)[place].clone()
        gradient.view(-1)[place] = bad
        growth = observed(topology, [(torch.ones(1, 30), torch.ones(1, 20))], 5)
        assert not bool(growth.finite)
        old = topology.index.clone()
        pool = (growth.active, growth.positions, growth.scores)
        rewire_(topology, torch.rand(topology.n_blocks), *pool, 5, growth.finite)
        assert torch.equal(topology.index, old)
        gradient.view(-1)[place] = saved


def test_scoring_holds_no_dense_gradient_of_single_weights(monkeypatch):
    monkeypatch.setitem(dense._STRIPE_ELEMENTS, "cpu", 4096)
    topology = Topology.random((256, 256), 0.01)._with_layout("gpu")
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(
                [largest, *(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))]
            )
            return out

    with Sizes():
        growth = observed(topology, [(torch.randn(8, 256), torch.randn(8, 256))], 100)
        pool = (growth.active, growth.positions, growth.scores)
        rewire_(topology, torch.rand(topology.n_blocks), *pool, 100, growth.finite)
    assert 4096 <= largest <= 4096 + 256
