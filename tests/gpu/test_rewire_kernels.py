"""Updates of blocks by kernels against the same in torch: index, slots, counts and zeros, bit for bit."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_kernels as sk
from sparse_kernels import rewiring, testing
from sparse_kernels.backend import INTERPRETED
from sparse_kernels.rewiring import Rewiring, plan_rewiring, takes_kernels
from sparse_kernels.topology import Topology
from sparse_kernels.triton import rewire, selection, slots
from sparse_kernels.triton.launch import Launch

# Shape, block, groups: a ragged grid, one block, groups, more columns than a tile of a row, one column.
GEOMETRIES = (
    ((12, 20), (4, 2), 1),
    ((8, 8), 8, 1),
    ((12, 4, 2, 2), (2, 4), 3),
    ((4, 1060), (2, 2), 1),
    ((12, 2), (2, 2), 1),
)
SEEDS = len(testing.PATTERNS) if INTERPRETED else 200


def on_device(topology: Topology, device: str) -> Topology:
    return topology.to(device) if device == "cuda" else topology._with_layout("gpu")


def scores_like(rng: random.Random, size: int, device: str) -> Tensor:
    """Ordinary ones, many ties, nothing but ties, zeros of both signs, some that are not finite."""
    kind = rng.randrange(5)
    found = torch.rand(size)
    if kind == 1:
        found = torch.randint(0, 3, (size,)).float()
    elif kind == 2:
        found.zero_()
    elif kind == 3:
        found = torch.where(found < 0.5, 0.0, -0.0)
    elif kind == 4:
        found[found < 0.2] = rng.choice((torch.nan, torch.inf))
    return found.to(device)


def both(topology: Topology, drops: Tensor, grid: Tensor, k: int | Tensor, ok: Tensor, *followers: Tensor):
    """The plan of the kernels, and that of the oracle."""
    assert takes_kernels(topology, drops, grid)
    arguments = (topology, drops, drops, None, grid, k, ok, followers)
    found = plan_rewiring(*arguments)
    with sk.use_backend("reference"):
        assert not takes_kernels(topology, drops, grid)
        expected = plan_rewiring(*arguments)
    return found, expected


def assert_same(found: Rewiring, expected: Rewiring, n: int, case: object) -> None:
    assert found.index.dtype == torch.int32
    assert torch.equal(found.index.long(), expected.index), case
    assert torch.equal(found.replaced, expected.replaced), case
    if expected.steps:
        zeroed = found.taken[: int(found.replaced)].sort().values.long()
        assert torch.equal(zeroed, expected.steps[0][1].nonzero().flatten()), case


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_chains_of_updates(geometry: tuple, device: str) -> None:
    """Patterns with empty and full rows and columns; every k; slots that are moved by the updates before."""
    shape, block, groups = geometry
    updates, first = 0, 1000 * GEOMETRIES.index(geometry)
    step = 4 if INTERPRETED and shape[1] > 1000 else 1
    for seed in range(0, SEEDS, step):
        rng = random.Random(first + seed)
        torch.manual_seed(first + seed)
        pattern = testing.PATTERNS[seed % len(testing.PATTERNS)]
        start = testing.random_topology(shape, pattern, rng.choice((0.05, 0.3, 0.8)), block, groups)
        if start.n_blocks == 0:
            continue
        topology = on_device(start, device)
        n, total = topology.n_blocks, topology.rows * topology.cols
        for _ in range(2):
            k = rng.choice((0, 1, n, rng.randint(0, n)))
            asked = rng.choice((k, torch.tensor(k, device=device), torch.tensor(k, device=device).int()))
            ok = torch.tensor(rng.random() < 0.8, device=device)
            values = torch.randn(topology.values_shape, device=device)
            drops, grid = scores_like(rng, n, device), scores_like(rng, total, device)
            with testing.poisoned_memory():
                found, expected = both(topology, drops, grid, asked, ok, values)
            case = (pattern, seed, k, bool(ok))
            assert_same(found, expected, n, case)
            wanted = values.masked_fill(expected.steps[0][1].view(-1, 1, 1), 0)
            found.apply_()
            assert torch.equal(values, wanted), case
            topology.validate()
            updates += 1
    assert updates > SEEDS // step


def test_nothing_changes_without_permission_or_with_k_0(device: str) -> None:
    topology = on_device(Topology.random((16, 24), 0.4, 4), device)
    n, total = topology.n_blocks, topology.rows * topology.cols
    topology.load_arrays_(topology.row_ptr, topology.col_idx, torch.randperm(n))
    for k, ok in ((n, False), (0, True)):
        values = torch.full(topology.values_shape, torch.nan, device=device)
        drops = torch.full((n,), torch.nan if k else 1.0, device=device)
        plan = plan_rewiring(
            topology, drops, drops, None, torch.rand(total, device=device), k,
            torch.tensor(ok, device=device), [values],
        )  # fmt: skip
        before = topology.index.clone()
        plan.apply_()
        assert int(plan.replaced) == 0
        assert torch.equal(topology.index, before)
        assert values.isnan().all()


def test_a_k_out_of_range_stays_in_memory(device: str) -> None:
    topology = on_device(Topology.random((12, 20), 0.4, 4), device)
    n, total = topology.n_blocks, topology.rows * topology.cols
    drops, grid = torch.rand(n, device=device), torch.rand(total, device=device)
    ok = torch.tensor(True, device=device)
    for k, held in ((-3, 0), (10**6, n)):
        found = plan_rewiring(topology, drops, drops, None, grid, torch.tensor(k, device=device), ok)
        expected = plan_rewiring(topology, drops, drops, None, grid, held, ok)
        assert torch.equal(found.index, expected.index)


@pytest.mark.parametrize("kind", ["random", "ties", "equal", "signs"])
@pytest.mark.parametrize("size", [1, 700, selection.SMALL + 1, 3 * selection.SMALL])
def test_cut(kind: str, size: int, device: str) -> None:
    """More keys than one tile, of every exponent and both signs, against a stable sort."""
    scores = torch.randint(-(2**31), 2**31, (size,)).int().view(torch.float32).nan_to_num(1.0)
    if kind == "ties":
        scores = torch.randint(0, 4, (size,)).float()
    elif kind == "equal":
        scores = torch.full((size,), -2.5)
    elif kind == "signs":
        scores = torch.where(scores > 0, 0.0, -0.0)
    bits = torch.where(scores == 0, 0, scores.view(torch.int32))
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(device)
    order = scores.sort(stable=True).indices
    for k in sorted({0, 1, size // 3, size}):
        work = torch.cat([keys, keys.new_zeros(2)])
        selection.launch(work, 0, size, size, k, size)
        last, place = work[size:].tolist()
        chosen = (keys < last) | ((keys == last) & (torch.arange(size, device=device) <= place))
        assert torch.equal(chosen.nonzero().flatten().cpu(), order[:k].sort().values), (kind, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("score", ["l1", "l2"])
@pytest.mark.parametrize("block", [(2, 3), (16, 16), (64, 64)])
def test_survey(dtype: torch.dtype, score: str, block: tuple[int, int], device: str) -> None:
    values = torch.randn(5, *block, device=device, dtype=dtype)
    gradient = torch.randn_like(values)
    scores, finite = slots.survey(values, gradient, score)
    exact = (
        values.double().abs().sum((1, 2)) if score == "l1" else values.double().square().sum((1, 2)).sqrt()
    )
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=0)
    assert finite.tolist() == [True, True]
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoiled = values.clone()
        spoiled[-1, -1, -1] = bad
        assert slots.survey(spoiled, gradient, score)[1].tolist() == [True, False]
        assert slots.survey(values, spoiled, score)[1].tolist() == [False, True]


def test_equal_blocks_have_equal_scores(device: str) -> None:
    values = torch.randn(1, 16, 16, device=device).expand(6, 16, 16).contiguous()
    scores, _ = slots.survey(values, values, "l2")
    assert torch.equal(scores, scores[:1].expand(6))


def test_followers_of_every_kind_are_zeroed(device: str) -> None:
    """More than one launch takes, other dtypes and sizes, and what cannot be read as 32-bit words."""
    topology = on_device(Topology.random((12, 20), 0.5, (4, 2)), device)
    n = topology.n_blocks
    followers = [torch.ones(topology.values_shape, device=device) for _ in range(5)]
    followers += [torch.ones(n, 4, 1, device=device, dtype=torch.float64)]
    followers += [torch.ones(topology.values_shape, device=device, dtype=torch.bfloat16)]
    followers += [torch.ones(n, 1, 1, device=device, dtype=torch.float16)]
    followers += [torch.ones(2, 4, n, device=device).permute(2, 1, 0)]
    followers += [torch.ones(n * 8 + 1, device=device)[1:].view(n, 8)]
    grid = torch.rand(topology.rows * topology.cols, device=device)
    drops, ok = torch.rand(n, device=device), torch.tensor(True, device=device)
    found, expected = both(topology, drops, grid, n // 2, ok, *followers)
    zeroed = expected.steps[0][1]
    assert 0 < int(zeroed.sum()) < n
    for _ in range(2):  # a repetition gives the same
        found.apply_()
        for tensor in followers:
            assert torch.equal(tensor.flatten(1) == 0, zeroed[:, None].expand_as(tensor.flatten(1)))


def test_repeated_plans_are_equal(device: str) -> None:
    topology = on_device(Topology.random((24, 20), 0.5, (4, 2)), device)
    n = topology.n_blocks
    drops = torch.randint(0, 3, (n,), device=device).float()
    grid = torch.randint(0, 3, (topology.rows * topology.cols,), device=device).float()
    ok = torch.tensor(True, device=device)
    plans = [plan_rewiring(topology, drops, drops, None, grid, n // 2, ok) for _ in range(3)]
    for plan in plans[1:]:
        assert torch.equal(plan.index, plans[0].index)
        count = int(plan.replaced)
        assert torch.equal(plan.taken[:count], plans[0].taken[:count])


def test_what_is_too_large_or_wide_goes_through_torch(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = on_device(Topology.random((12, 20), 0.5, 4), device)
    single = on_device(Topology.random((12, 20), 0.5), device)
    scores = torch.rand(3, device=device)
    assert takes_kernels(topology, scores, scores)
    assert not takes_kernels(topology, scores, scores.double())
    assert not takes_kernels(single, scores)
    monkeypatch.setattr(rewire, "POSITIONS", 14)
    assert not takes_kernels(topology, scores)


def test_launches(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an update costs in eager mode is launches: eight to decide, a copy and one to make it."""
    launched, called = [], []
    launch = Launch.__call__

    def counted(self: Launch, *args: object) -> None:
        launched.append(1)
        launch(self, *args)

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    topology = on_device(Topology.random((12, 20), 0.5, 4), device)
    n = topology.n_blocks
    drops, grid = torch.rand(n, device=device), torch.rand(topology.rows * topology.cols, device=device)
    ok, values = torch.tensor(True, device=device), torch.ones(topology.values_shape, device=device)
    monkeypatch.setattr(Launch, "__call__", counted)
    if INTERPRETED:  # its arithmetic is no matter of ours
        monkeypatch.setattr(Launch, "__call__", lambda self, *args: launched.append(1))
    with Calls():
        plan = rewiring.plan_rewiring(topology, drops, drops, None, grid, 3, ok, [values] * 4)
        if INTERPRETED:
            plan.replaced.zero_(), called.pop()
        plan.apply_()
    assert len(launched) == 9
    assert [c for c in called if c not in ("empty", "view", "detach", "lift_fresh")] == ["copy_"]
