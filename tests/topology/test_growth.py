"""Growth scores against the whole dense gradient; ties to the lowest position (drills D01, D02, D13)."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

from sparse_kernels import Topology, _ops, dense, reference, testing
from sparse_kernels.growth import GradientSum, GrowthScorer

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import kernel_cases as kc  # noqa: E402


def conf_of(case):
    return () if case.conf is None else (*case.conf, case.topology.groups)


def gradients(case):
    """The dense weight gradient and its magnitude, in float64."""
    out = []
    for x, dy in ((case.x.double(), case.dy.double()), (case.x.double().abs(), case.dy.double().abs())):
        weight = torch.zeros(case.topology.shape, dtype=torch.float64, requires_grad=True)
        y = case.dense_forward(x, weight, None)
        out.append(torch.autograd.grad(y, weight, dy)[0])
    return out


def wanted(scores, topology, k):
    return reference.top_inactive(scores, topology, k).sort().values


def score(case, k, block_score):
    scorer = GrowthScorer(case.topology, k, block_score)
    scorer.observe(case.x, case.dy, *conf_of(case))
    return scorer.result()


@pytest.fixture(params=[None, 300], ids=["one stripe", "many stripes"])
def stripe(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setitem(dense._STRIPE_ELEMENTS, "cpu", request.param)


@pytest.mark.parametrize("dtype", testing.NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("kind", list(kc.KINDS))
def test_scores_stay_within_the_componentwise_bound(kind, dtype):
    for case in kc.cases(kind, dtype, 300):
        topology = case.topology
        gradient, magnitude = gradients(case)
        exact, size = (reference.growth_scores(g, topology) for g in (gradient, magnitude))
        k = 7
        growth = score(case, k, "l1")
        assert growth.finite, case.name
        known = growth.active > -torch.inf  # the others need no score
        of_active = topology.positions()[known]
        testing.assert_componentwise(growth.active[known], exact[of_active], size[of_active], name=case.name)
        found = growth.positions
        assert found.numel() == min(k, topology.rows * topology.cols - topology.n_blocks), case.name
        testing.assert_componentwise(growth.scores, exact[found], size[found], name=case.name)
        best = exact[reference.top_inactive(exact, topology, k)]
        assert bool((found.diff() > 0).all()), case.name
        slack = size.max() if size.numel() else torch.zeros(())
        sorted_scores = growth.scores.sort(descending=True).values
        testing.assert_componentwise(sorted_scores, best, slack.expand_as(best), name=case.name)
        assert not bool(torch.isin(found, topology.positions()).any()), case.name


@pytest.mark.parametrize("kind", list(kc.KINDS))
def test_candidates_on_integers_are_those_of_the_dense_gradient(kind, stripe):
    """Small integers tie everywhere, so the order is decided by position almost always."""
    for case in kc.cases(kind, torch.float32, 250, integers=True):
        topology = case.topology
        for block_score in ("l1", "l2"):
            scores = reference.growth_scores(gradients(case)[0].float(), topology, block_score)
            for k in (1, 40):
                growth = score(case, k, block_score)
                assert torch.equal(growth.positions, wanted(scores, topology, k)), case.name
                assert torch.equal(growth.scores, scores[growth.positions]), case.name
                known = growth.active > -torch.inf
                of_active = scores[topology.positions()]
                assert torch.equal(growth.active[known], of_active[known]), case.name
                if not bool(known.all()):  # ties would go by position
                    assert bool((of_active[~known] < growth.scores.min()).all()), case.name


def tied_scores(rng, generator, rows, cols):
    kind = rng.choice(("three", "equal", "zeros"))
    if kind == "three":
        return torch.randint(0, 3, (rows, cols), generator=generator).float()
    if kind == "equal":
        return torch.full((rows, cols), float(rng.randint(0, 2)))
    return torch.where(torch.rand(rows, cols, generator=generator) < 0.5, 0.0, -0.0)


def test_ties_go_to_the_lowest_position():
    """1,000 score tensors, fed exactly: with X the identity the weight gradient is dY transposed."""
    for seed in range(1000):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        rows, cols = rng.choice(((5, 9), (17, 33), (40, 70)))
        topology = Topology.random((rows, cols), rng.choice((0.0, 0.1, 0.5)), generator=generator)
        k = rng.choice((1, 5, 60, rows * cols))
        gradient = tied_scores(rng, generator, rows, cols)
        gradient *= torch.randint(0, 2, (rows, cols), generator=generator) * 2 - 1
        scorer = GrowthScorer(topology, k)
        scorer.observe(torch.eye(cols), gradient.t())
        scores, active = gradient.abs().flatten().tolist(), set(topology.positions().tolist())
        inactive = (p for p in range(rows * cols) if p not in active)
        best = sorted(inactive, key=lambda p: (-scores[p], p))[:k]
        assert scorer.result().positions.tolist() == sorted(best), f"seed {seed}"


@pytest.mark.parametrize("k", [1, 3, 700])
def test_more_candidates_than_the_buffer_holds(k):
    """Ascending scores make every later position better: the buffer overflows again and again."""
    topology = Topology.random((64, 160), 0.1, generator=torch.Generator().manual_seed(0))
    gradient = torch.arange(64 * 160, dtype=torch.float32).view(64, 160) // 3
    scorer = GrowthScorer(topology, k)
    scorer.observe(torch.eye(160), gradient.t())
    assert torch.equal(scorer.result().positions, wanted(gradient.flatten(), topology, k))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["active", "inactive"])
def test_a_score_that_is_not_finite_is_reported(bad, where, monkeypatch):
    topology = Topology.random((20, 30), 0.3, generator=torch.Generator().manual_seed(1))
    position = int(topology.positions()[4])
    if where == "inactive":
        position = int(reference.top_inactive(torch.zeros(600), topology, 9)[-1])
    gradient = torch.randn(20, 30, generator=torch.Generator().manual_seed(2))
    # A product cannot hold one bad entry alone, so the gradient itself is given.
    monkeypatch.setattr(
        GradientSum, "stripes", lambda self: [(0, gradient[:7].clone()), (7, gradient[7:].clone())]
    )
    for expected in (True, False):
        scorer = GrowthScorer(topology, 5)
        scorer.observe(torch.ones(1, 30), torch.ones(1, 20))
        assert scorer.result().finite is expected
        gradient.view(-1)[position] = bad


def test_deferred_pairs_are_summed():
    topology = Topology.random((12, 18), 0.25, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)
    pairs = [
        (
            torch.randn(5, 18, generator=generator, dtype=torch.float64),
            torch.randn(5, 12, generator=generator, dtype=torch.float64),
        )
        for _ in range(3)
    ]
    scorer = GrowthScorer(topology, 9, defer=True)
    for x, dy in pairs:
        scorer.observe(x, dy)
    scores = sum(dy.t() @ x for x, dy in pairs).abs().flatten()
    growth = scorer.result()
    assert torch.equal(growth.positions, wanted(scores, topology, 9))
    single = GrowthScorer(topology, 9)
    with pytest.raises(RuntimeError, match="no backward"):
        single.result()
    for x, dy in pairs:
        single.observe(x, dy)
    with pytest.raises(RuntimeError, match="3 backward passes"):
        single.result()


def test_bad_arguments_are_named():
    topology = Topology.random((4, 4), 0.5)
    with pytest.raises(ValueError, match="block_score"):
        GrowthScorer(topology, 1, "max")
    with pytest.raises(ValueError, match="k must not be negative"):
        GrowthScorer(topology, -1)


def screened(topology, x, dy, k):
    return _ops.growth_screen(x, dy, *topology._on_cpu(), k)


def can_screen():
    pair = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0))
    return screened(Topology(torch.tensor([0]), (32, 32)), *pair, 1)[0].numel() > 0


needs_screening = pytest.mark.skipif(
    not can_screen(), reason="bytes are multiplied no faster than floats on this instruction set"
)


def factors(kind, tokens, rows, cols, generator, integers):
    """Activations and output gradients as layers see them: also dead features, spikes, and many scales."""
    x, dy = (torch.randn(tokens, size, generator=generator) for size in (cols, rows))
    if kind == "relu":
        x = x.relu()
        dy = dy * (torch.rand(tokens, rows, generator=generator) < 0.3)
    if kind == "scales":
        x = x * torch.logspace(-6, 6, cols)
        dy = dy * torch.logspace(4, -8, rows)
    if kind == "spikes":
        dy[tokens // 2] *= 1000
        x[:, ::7] = 0
        dy[:, 1::5] = 0
    return (x.mul(2).round(), dy.mul(2).round()) if integers else (x, dy)


@needs_screening
@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("kind", ["gaussian", "relu", "scales", "spikes"])
def test_screening_finds_what_scoring_everything_finds(kind, integers):
    """Integers tie, and their sums are exact: the same positions. Others: the k best but for rounding."""
    generator = torch.Generator().manual_seed(0)
    used = 0
    for tokens, rows, cols, k in ((64, 96, 160, 9), (257, 40, 33, 5), (3, 130, 70, 40), (1, 64, 64, 3)):
        topology = Topology.random((rows, cols), 0.1, generator=generator)
        x, dy = factors(kind, tokens, rows, cols, generator, integers and kind != "scales")
        active, positions, scores = screened(topology, x, dy, k)
        if active.numel() == 0:  # too many candidates
            continue
        used += 1
        exact = (dy.double().t() @ x.double()).abs().flatten()
        size = (dy.double().abs().t() @ x.double().abs()).flatten()
        best = reference.top_inactive(exact, topology, k)
        of_active, known = topology.positions(), active > -torch.inf
        if integers and kind not in ("scales", "spikes"):
            assert torch.equal(positions, best.sort().values)
            assert torch.equal(scores.double(), exact[positions])
            assert torch.equal(active[known].double(), exact[of_active][known])
        slack = 4e-7 * tokens * size
        assert bool(((scores - exact[positions]).abs() <= slack[positions]).all())
        assert bool(((active[known] - exact[of_active][known]).abs() <= slack[of_active][known]).all())
        least = exact[best[-1]] - slack.max() * 2
        assert bool((exact[positions] >= least).all())
        assert bool((exact[of_active][~known] <= exact[best[-1]] + slack[of_active][~known]).all())
        assert not bool(torch.isin(positions, of_active).any())
    assert used > 0 or kind == "spikes"


@needs_screening
def test_screening_is_the_same_for_any_number_of_threads():
    generator = torch.Generator().manual_seed(1)
    topology = Topology.random((300, 500), 0.05, generator=generator)
    x, dy = factors("relu", 100, 300, 500, generator, False)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(screened(topology, x, dy, 500))
    finally:
        torch.set_num_threads(threads)
    assert results[0][0].numel() > 0
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@needs_screening
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30, 1e-30])
def test_screening_leaves_what_it_cannot_bound(bad):
    topology = Topology.random((64, 64), 0.1, generator=torch.Generator().manual_seed(0))
    for where in (0, 1):
        pair = [torch.randn(8, 64), torch.randn(8, 64)]
        pair[where][3, 5] = bad
        if bad == 1e-30:
            pair[where][:, 5] = bad
        assert screened(topology, *pair, 3)[0].numel() == 0
