"""Hostile index sets: refused by name, nothing changed, never a signal (drill D27)."""

from __future__ import annotations

import random

import pytest
import torch

import sparse_kernels as sk
from sparse_kernels import Topology

HUGE = (2**31 - 1, 2**31, 2**40, 2**62, -(2**63), -1, -(2**31))


def sound(rng, generator):
    """A layer and its CSR arrays as int64 (so that any corruption can be written into them)."""
    if rng.random() < 0.5:
        block = rng.choice((1, 1, (2, 3)))
        layer = sk.SparseLinear(18, 24, density=0.3, block_size=block, generator=generator)
    else:
        block = rng.choice((1, 1, 2))
        layer = sk.SparseConv2d(8, 12, 3, density=0.3, groups=2, block_size=block, generator=generator)
    topology = layer.topology
    return layer, topology.row_ptr.long(), topology.col_idx.long()


def out_of_range(rng, ptr, idx, cols):
    idx[rng.randrange(len(idx))] = rng.choice((cols, cols + 1, *HUGE))
    return ptr, idx, "col_idx"


def negative(rng, ptr, idx, cols):
    idx[rng.randrange(len(idx))] = -rng.randint(1, 10**6)
    return ptr, idx, "col_idx"


def unsorted(rng, ptr, idx, cols):
    row = rng.choice([r for r in range(len(ptr) - 1) if ptr[r + 1] - ptr[r] >= 2])
    at = int(ptr[row])
    idx[[at, at + 1]] = idx[[at + 1, at]]
    return ptr, idx, "col_idx"


def duplicate(rng, ptr, idx, cols):
    row = rng.choice([r for r in range(len(ptr) - 1) if ptr[r + 1] - ptr[r] >= 2])
    idx[int(ptr[row]) + 1] = idx[int(ptr[row])]
    return ptr, idx, "col_idx"


def not_monotone(rng, ptr, idx, cols):
    at = rng.randrange(1, len(ptr) - 1)
    ptr[at] = rng.choice((int(ptr[-1]) + rng.randint(1, 9), -1, *HUGE))
    return ptr, idx, "row_ptr"


def wrong_first(rng, ptr, idx, cols):
    ptr[0] = rng.choice((1, *HUGE))
    return ptr, idx, "row_ptr"


def wrong_last(rng, ptr, idx, cols):
    ptr[-1] = rng.choice((0, int(ptr[-1]) - 1, int(ptr[-1]) + 1, *HUGE))
    return ptr, idx, "row_ptr"


def wrong_length(rng, ptr, idx, cols):
    if rng.random() < 0.5:
        return ptr[:-1] if rng.random() < 0.5 else torch.cat([ptr, ptr[-1:]]), idx, "row_ptr"
    return ptr, idx[:-1] if rng.random() < 0.5 else torch.cat([idx, idx[-1:]]), "col_idx"


def wrong_dims(rng, ptr, idx, cols):
    if rng.random() < 0.5:
        return ptr.unsqueeze(rng.randint(0, 1)), idx, "row_ptr"
    return ptr, idx.unsqueeze(rng.randint(0, 1)), "col_idx"


def wrong_dtype(rng, ptr, idx, cols):
    dtype = rng.choice((torch.float32, torch.float64, torch.bool, torch.int16, torch.complex64))
    return (ptr.to(dtype), idx, "row_ptr") if rng.random() < 0.5 else (ptr, idx.to(dtype), "col_idx")


def not_a_tensor(rng, ptr, idx, cols):
    junk = rng.choice((None, "indices", 3, [0, 1], {}))
    return (junk, idx, "row_ptr") if rng.random() < 0.5 else (ptr, junk, "col_idx")


CORRUPTIONS = (
    out_of_range, negative, unsorted, duplicate, not_monotone, wrong_first, wrong_last, wrong_length,
    wrong_dims, wrong_dtype, not_a_tensor,
)  # fmt: skip


def snapshot(layer):
    return [t.detach().clone() for t in (layer.values, layer.bias, layer.topology.index)]


def unchanged(layer, before):
    return all(
        torch.equal(now, then)
        for now, then in zip((layer.values, layer.bias, layer.topology.index), before, strict=True)
    )


def hostile_sets(count):
    for seed in range(count):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        corrupt = CORRUPTIONS[seed % len(CORRUPTIONS)]
        layer, ptr, idx = sound(rng, generator)
        yield layer, corrupt(rng, ptr, idx, layer.topology.cols), f"seed {seed}, {corrupt.__name__}"


def test_loading_refuses_hostile_arrays_and_changes_nothing():
    for layer, (ptr, idx, field), label in hostile_sets(500):
        before = snapshot(layer)
        with pytest.raises((ValueError, TypeError), match=field):
            layer.topology.load_arrays_(ptr, idx)
        assert unchanged(layer, before), label
        layer.topology.validate()


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_dict_with_hostile_arrays_is_refused_and_changes_nothing(strict):
    for layer, (ptr, idx, field), label in hostile_sets(500):
        state = {
            "values": torch.full_like(layer.values, 7.0),
            "bias": torch.full_like(layer.bias, 7.0),
            "row_ptr": ptr,
            "col_idx": idx,
        }
        before = snapshot(layer)
        with pytest.raises((RuntimeError, ValueError, TypeError), match=field):
            layer.load_state_dict(state, strict=strict)
        assert unchanged(layer, before), label


@pytest.mark.parametrize("key", ["values", "bias"])
def test_a_state_dict_with_other_values_is_refused_and_changes_nothing(key):
    for make in (
        lambda t: t[:-1],
        lambda t: t.unsqueeze(0),
        lambda t: torch.cat([t, t]),
        lambda t: t.new_zeros(0),
        lambda t: "values",
        lambda t: None,
    ):
        layer = sk.SparseLinear(18, 24, density=0.3, generator=torch.Generator().manual_seed(0))
        other = sk.SparseLinear(18, 24, density=0.3, generator=torch.Generator().manual_seed(1))
        state = other.state_dict()
        state[key] = make(state[key])
        before = snapshot(layer)
        with pytest.raises(RuntimeError, match=key):
            layer.load_state_dict(state)
        assert unchanged(layer, before)


def hostile_positions(rng):
    """Positions of a 12 x 20 grid (240), the error's type and what it must say."""
    good = torch.randperm(240, generator=torch.Generator().manual_seed(rng.randrange(2**30)))[:40]
    kind = rng.choice(("range", "negative", "repeated", "dtype", "object"))
    at = rng.randrange(40)
    if kind == "range":
        good[at] = rng.choice((240, 241, 2**31, 2**40, 2**62))
        return good, ValueError, "out of range"
    if kind == "negative":
        good[at] = rng.choice((-1, -240, -(2**63)))
        return good, ValueError, "out of range"
    if kind == "repeated":
        good[at] = good[(at + 1) % 40]
        return good, ValueError, "more than once"
    if kind == "dtype":
        return good.to(rng.choice((torch.float32, torch.bool, torch.int16))), TypeError, "positions"
    return rng.choice((None, [1, 2], "positions", 3)), TypeError, "positions"


def test_the_constructor_refuses_hostile_positions():
    for seed in range(500):
        positions, error, message = hostile_positions(random.Random(seed))
        with pytest.raises(error, match=message):
            Topology(positions, (12, 20))


def test_an_update_refuses_hostile_positions_and_changes_nothing():
    for seed in range(500):
        rng = random.Random(seed)
        topology = Topology.random((12, 20), 0.2, generator=torch.Generator().manual_seed(seed))
        before = topology.index.clone()
        active = topology.positions().tolist()
        free = [p for p in range(240) if p not in set(active)]
        drop, grow = torch.tensor([0, 5, 9]), torch.tensor(rng.sample(free, 3))
        victim, name = (drop, "drop") if rng.random() < 0.5 else (grow, "grow")
        bad = [-1, *HUGE, int(victim[1])] + ([48] if name == "drop" else [240, active[1]])
        victim[0] = rng.choice(bad)
        with pytest.raises(ValueError, match=name):
            topology.update_(drop, grow)
        assert torch.equal(topology.index, before)
        for wrong in (torch.tensor([0.5, 1.5, 2.5]), torch.zeros(3, dtype=torch.bool)):
            with pytest.raises(TypeError, match="drop|grow"):
                topology.update_(wrong, torch.tensor(free[:3]))
        assert torch.equal(topology.index, before)
