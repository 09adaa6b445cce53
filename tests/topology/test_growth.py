"""Growth scores against the whole dense gradient; ties to the lowest position (drills D01, D02, D13)."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

from sparse_kernels import Topology, dense, reference, testing
from sparse_kernels.growth import GrowthScorer

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
        testing.assert_componentwise(
            growth.active, exact[topology.positions()], size[topology.positions()], name=case.name
        )
        found = growth.positions
        assert found.numel() == min(k, topology.rows * topology.cols - topology.n_blocks), case.name
        testing.assert_componentwise(growth.scores, exact[found], size[found], name=case.name)
        best = exact[reference.top_inactive(exact, topology, k)]
        slack = size.max() if size.numel() else torch.zeros(())
        testing.assert_componentwise(growth.scores, best, slack.expand_as(best), name=case.name)
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
                assert torch.equal(growth.positions, reference.top_inactive(scores, topology, k)), case.name
                assert torch.equal(growth.active, scores[topology.positions()]), case.name


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
        wanted = sorted(inactive, key=lambda p: (-scores[p], p))[:k]
        assert scorer.result().positions.tolist() == wanted, f"seed {seed}"


@pytest.mark.parametrize("k", [1, 3, 700])
def test_more_candidates_than_the_buffer_holds(k):
    """Ascending scores make every later position better: the buffer overflows again and again."""
    topology = Topology.random((64, 160), 0.1, generator=torch.Generator().manual_seed(0))
    gradient = torch.arange(64 * 160, dtype=torch.float32).view(64, 160) // 3
    scorer = GrowthScorer(topology, k)
    scorer.observe(torch.eye(160), gradient.t())
    assert torch.equal(scorer.result().positions, reference.top_inactive(gradient.flatten(), topology, k))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["active", "inactive"])
def test_a_score_that_is_not_finite_is_reported(bad, where, stripe, monkeypatch):
    topology = Topology.random((20, 30), 0.3, generator=torch.Generator().manual_seed(1))
    position = int(topology.positions()[4])
    if where == "inactive":
        position = int(reference.top_inactive(torch.zeros(600), topology, 9)[-1])
    gradient = torch.randn(20, 30, generator=torch.Generator().manual_seed(2))
    # A product cannot hold one bad entry alone, so the gradient itself is given.
    monkeypatch.setattr(dense, "linear_stripe", lambda x, dy, topology, begin, end: gradient[begin:end])
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
    assert torch.equal(growth.positions, reference.top_inactive(scores, topology, 9))
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
