"""Growth scores computed tile by tile on the device, against the whole dense gradient."""

from __future__ import annotations

import pytest
import torch
from product_cases import gpu_topology

from sparse_kernels import dense, testing
from sparse_kernels import growth as scoring
from sparse_kernels.growth import GradientSum, best_weights
from sparse_kernels.triton import growth, operators
from sparse_kernels.triton.configs import Config

TILE = Config(16, 0, 4, 2)


def _operands(tokens: int, inputs: int, outputs: int, device: str, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(tokens + inputs)
    x = torch.randint(-2, 3, (tokens, inputs), generator=generator).to(device, dtype)
    dy = torch.randint(-2, 3, (tokens, outputs), generator=generator).to(device, dtype)
    return x, dy, (dy.double().t() @ x.double()).abs()


@pytest.mark.parametrize("block", [(16, 16), (64, 64), (128, 128), (32, 128), (128, 16)])
@pytest.mark.parametrize("score", ["l1", "l2"])
def test_block_norms(block: tuple[int, int], score: str, device: str) -> None:
    b_out, b_in = block
    x, dy, g = _operands(37, 3 * b_in + (256 - 256 % b_in), 3 * b_out, device, torch.float16)
    found = operators.growth_norms(x, dy, b_out, b_in, score)
    blocks = g.reshape(3, b_out, -1, b_in)
    expected = blocks.sum((1, 3)) if score == "l1" else blocks.square().sum((1, 3)).sqrt()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        dense.growth_norms(x, dy, b_out, b_in, score).double(), expected, rtol=1e-6, atol=0
    )


def test_a_score_that_is_not_finite_shows(device: str) -> None:
    x, dy, _ = _operands(20, 64, 64, device)
    x[3, 40] = float("nan")
    found = operators.growth_norms(x, dy, 16, 16, "l1")
    assert torch.equal(found.isfinite().all(0).cpu(), torch.tensor([True, True, False, True]))


@pytest.mark.parametrize("of_a_sum", [False, True])
def test_gradients_of_any_strides(of_a_sum: bool, device: str) -> None:
    """Those that a sum or a transposition leaves."""
    x, dy, _ = _operands(40, 96, 64, device)
    x = x.t().contiguous().t()
    dy = torch.ones((), device=device).expand(40, 64) if of_a_sum else dy.t().contiguous().t()
    g = (dy.double().t() @ x.double()).abs()
    found = operators.growth_norms(x, dy, 16, 32, "l1")
    assert torch.equal(found.double(), g.view(4, 16, 3, 32).sum((1, 3)))
    active, none = torch.zeros(1, dtype=torch.int64, device=device), torch.tensor(torch.inf, device=device)
    positions, scores, _ = operators.growth_candidates(x, dy, active, 10, none)
    there = positions >= 0
    assert set(_best(g, active, 10)) <= set(positions.tolist())
    assert torch.equal(scores[there].double(), g.flatten()[positions[there].long()])


def _best(g: torch.Tensor, active: torch.Tensor, k: int) -> list[int]:
    """The k best inactive positions by Python's sort."""
    taken, flat = set(active.tolist()), g.flatten().tolist()
    return sorted((i for i in range(len(flat)) if i not in taken), key=lambda i: (-flat[i], i))[:k]


@pytest.mark.parametrize("guess", [0.0, 20.0, 60.0, float("inf")])
@pytest.mark.parametrize("shape", [(152, 200), (128, 128), (8, 300)])
@pytest.mark.parametrize("room", [0, 70_000])
def test_candidates_hold_the_best(
    guess: float, shape: tuple[int, int], room: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the first guess, the best inactive entries are in the list; many entries are equal."""
    monkeypatch.setattr(growth, "capacity", lambda n, k: n + k + room)
    outputs, inputs = shape
    x, dy, g = _operands(40, inputs, outputs, device)
    generator = torch.Generator().manual_seed(1)
    active = (
        torch.randperm(outputs * inputs, generator=generator)[: outputs * inputs // 5]
        .sort()
        .values.to(device)
    )
    k = 50
    start = torch.tensor(guess, device=device)
    positions, scores, finite = growth.candidates(x, dy, active, k, start, config=TILE)
    assert finite
    there = positions >= 0
    assert torch.equal(scores[there].double(), g.flatten()[positions[there].long()])
    assert bool((scores[~there] == -torch.inf).all())
    assert positions[there].unique().numel() == int(there.sum())
    assert set(_best(g, active, k)) <= set(positions.tolist())


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_candidates_of_equal_scores_are_the_first(
    value: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer whose gradient is zero: the cut is found in the positions."""
    monkeypatch.setattr(growth, "capacity", lambda n, k: n + k)
    x, dy = torch.full((8, 300), value, device=device), torch.ones(8, 64, device=device)
    active = torch.arange(5, 40, device=device)
    start = torch.tensor(float("inf"), device=device)
    positions, _, finite = growth.candidates(x, dy, active, 10, start, config=TILE)
    assert sorted(positions.tolist()) == list(range(45))
    assert finite
    x[0, 0] = float("nan")
    _, _, finite = growth.candidates(x, dy, active, 10, start, config=TILE)
    assert not finite


def test_rows_that_do_not_end_on_16_bytes_are_refused(device: str) -> None:
    x, dy, _ = _operands(20, 30, 64, device)
    assert not growth.takes(x, dy)
    assert growth.takes(dy, dy)


@pytest.mark.parametrize("equal", [False, True])
def test_the_best_weights_of_a_layer(equal: bool, device: str) -> None:
    """The list of a kernel leads to the same weights as stripes of the dense gradient, update by update."""
    topology = gpu_topology(testing.random_topology((64, 96), "uniform", 0.2), device)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        values = (
            torch.zeros(2, 40, 96)
            if equal
            else torch.randint(-2, 3, (2, 40, 96), generator=generator).float()
        )
        x, dy = values[0].to(device), values[1, :, :64].contiguous().to(device)
        gradient = GradientSum(topology)
        gradient.add(x, dy)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scoring, "_by_kernel", lambda *_: False)
            expected = best_weights(gradient, topology, 100)
        found = best_weights(gradient, topology, 100)
        assert found.finite
        assert torch.equal(found.positions, expected.positions)
        assert torch.equal(found.scores, expected.scores)
        listed = found.active > -torch.inf
        assert torch.equal(found.active[listed], expected.active[listed])
        assert bool((expected.active[~listed] < expected.scores[-1]).all())
        assert topology.growth_guess is not None
        assert bool(topology.growth_guess.isfinite()) != equal
        drop = torch.randperm(topology.n_blocks, generator=generator)[:100]
        topology.update_(drop.to(device), found.positions)
