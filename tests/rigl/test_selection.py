"""Selection against Python's `sorted`, ties and signed zeros included (drill D13)."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rigl.selection import largest, magnitudes, random_outside, rewire, smallest


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
        positions = rng.sample(range(10 * n), n)  # any order
        ranked = sorted(range(n), key=lambda i: (-scores[i], positions[i]))
        grown = {positions[i] for i in ranked[:k]}
        found = largest(tensor, torch.tensor(positions), k).tolist()
        assert len(found) == k
        assert set(found) == grown


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
