"""Selection against Python's `sorted`, ties and signed zeros included (drill D13)."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rigl.selection import exchange, finite, magnitudes, random_outside, rewire, smallest, weakest
from sparse_kernels import Topology
from sparse_kernels.growth import Growth


def tied_scores(rng: random.Random) -> list[float]:
    n = rng.randint(1, 200)
    kind = rng.randrange(4)
    if kind == 0:
        return [float(rng.choice((0, 1, 2))) for _ in range(n)]
    if kind == 1:
        return [float(rng.choice((0, 1)))] * n
    if kind == 2:
        return [rng.choice((0.0, -0.0)) for _ in range(n)]
    return [rng.choice((0.0, -0.0, 1.0, 2.0)) for _ in range(n)]


def test_ties_go_by_position_1000_tensors() -> None:
    rng = random.Random(0)
    for case in range(1000):
        scores = tied_scores(rng)
        n, k = len(scores), rng.randint(0, len(scores))
        tensor = torch.tensor(scores, dtype=torch.float64 if case % 2 else torch.float32)
        dropped = sorted(sorted(range(n), key=lambda i: (scores[i], i))[:k])
        assert smallest(tensor, k).tolist() == dropped
        topology = Topology(torch.tensor(rng.sample(range(3 * n), n)), (3, n))
        places, positions = weakest(topology, tensor, k)
        assert places.tolist() == dropped
        assert torch.equal(positions, topology.positions()[places])


def test_what_is_dropped_and_grown_is_the_best_of_both_1000_tensors() -> None:
    rng = random.Random(1)
    for case in range(1000):
        scores = tied_scores(rng)
        n = len(scores)
        positions = sorted(rng.sample(range(3 * n), n))
        k = rng.randint(0, n // 2)
        old = sorted(rng.sample(range(n), k))
        new = [i for i in range(n) if i not in old]
        dtype = torch.float64 if case % 2 else torch.float32
        magnitude = torch.tensor(scores, dtype=dtype).abs()
        best = sorted(range(n), key=lambda i: (-scores[i], positions[i]))[:k]
        growth = Growth(
            magnitude,
            torch.tensor([positions[i] for i in new], dtype=torch.int64),
            magnitude[new],
            finite=True,
        )
        drop, grow = exchange(torch.tensor(old, dtype=torch.int64), torch.tensor(positions)[old], growth)
        assert drop.tolist() == [i for i in old if i not in best]
        assert grow.tolist() == [positions[i] for i in new if i in best]


def test_weakest_of_many_in_any_slots() -> None:
    """Sizes at which most scores share a few bins of the histogram, and values that stand anywhere."""
    generator = torch.Generator().manual_seed(0)
    for block in (1, 2):
        topology = Topology.random((128, 256), 0.5, block, generator=generator)
        if topology.slot is not None:
            topology.load_arrays_(
                topology.row_ptr, topology.col_idx, torch.randperm(topology.n_blocks, generator=generator)
            )
        scores = torch.randint(-3, 4, (topology.n_blocks,), generator=generator) * 1e-3
        k = topology.n_blocks // 3
        places, positions = weakest(topology, scores, k)
        all_positions = topology.positions()
        order = sorted(range(topology.n_blocks), key=lambda i: (abs(scores[i]), all_positions[i]))[:k]
        assert positions.tolist() == sorted(all_positions[order].tolist())
        assert torch.equal(all_positions[places], positions)


def test_finite_sees_every_entry() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for bad in (float("nan"), float("-nan"), float("inf"), -float("inf")):
            tensor = torch.zeros(37, dtype=dtype)
            assert finite(tensor)
            for i in range(37):
                tensor.fill_(torch.finfo(dtype).max)[i] = bad
                assert not finite(tensor)


def test_smallest_clips_k() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0])
    assert smallest(scores, 0).tolist() == smallest(scores, -1).tolist() == []
    assert smallest(scores, 3).tolist() == smallest(scores, 9).tolist() == [0, 1, 2]
    assert smallest(torch.empty(0), 0).tolist() == []


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_random_growth_avoids_what_is_kept(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 60))
    kept = sorted(data.draw(st.sets(st.integers(0, total - 1))))
    k = data.draw(st.integers(0, total - len(kept)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    grown = random_outside(torch.tensor(kept, dtype=torch.int64), total, k, generator).tolist()
    assert len(set(grown)) == k
    assert set(grown) <= set(range(total)) - set(kept)


def test_random_growth_is_uniform() -> None:
    kept, generator = torch.tensor([0, 3, 4, 8]), torch.Generator().manual_seed(0)
    counts = torch.zeros(12)
    for _ in range(4000):
        counts[random_outside(kept, 12, 2, generator)] += 1
    free = [1, 2, 5, 6, 7, 9, 10, 11]
    # 8000 draws over 8 positions: 1000 each, standard deviation about 27.
    assert counts[kept].sum() == 0
    assert (counts[free] - 1000).abs().max() < 130


def test_block_scores() -> None:
    blocks = torch.tensor([[[3.0, -4.0]], [[0.0, 6.0]]])
    assert magnitudes(blocks, "l1").tolist() == [7.0, 6.0]
    assert magnitudes(blocks, "l2").tolist() == [5.0, 6.0]
    assert magnitudes(torch.tensor([-2.0, 1.0], dtype=torch.bfloat16)).dtype == torch.float32


def test_dropped_and_grown_cancels() -> None:
    drop, grow = rewire(torch.tensor([1, 2, 5]), torch.tensor([10, 20, 50]), torch.tensor([20, 7, 50]))
    assert drop.tolist() == [1]
    assert grow.tolist() == [7]
    none = torch.empty(0, dtype=torch.int64)
    assert [t.tolist() for t in rewire(none, none, none)] == [[], []]
