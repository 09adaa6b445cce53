"""Poisoned memory, canaries around every buffer, and values that are not finite (drills D07 and D08)."""

from __future__ import annotations

import random
from dataclasses import replace

import kernel_cases as kc
import pytest
import torch
from torch.nn import functional as F

from sparse_kernels import _ops, testing


def small(kind, count, first, dtype=torch.float32):
    """Cases below a work limit: what is tested is the edges of buffers, not arithmetic."""
    for case in kc.cases(kind, dtype, 10 * count, first):
        if case.x.numel() * case.dy.numel() < 2**24 and case.topology.nnz < 20_000:
            yield case
            count -= 1
            if count == 0:
                return
    raise AssertionError("too few small cases")


def operators(case, x, values, bias, dy, index):
    """The raw operators on exactly these buffers: y, dx, dvalues, dbias."""
    topology = case.topology
    grid = (index, topology.rows, topology.cols)
    if case.conf is None:
        y = _ops.linear_forward(x, values, bias, *grid)
        return y, *_ops.linear_backward(dy, x, values, *grid, [*values.shape], True)
    conf = ([*topology.shape[2:]], *([*pair] for pair in case.conf), topology.groups)
    y = _ops.conv2d_forward(x, values, bias, *grid, *conf)
    return y, *_ops.conv2d_backward(dy, x, values, *grid, *conf, True, True, True)


@pytest.mark.parametrize("kind", list(kc.KINDS))
def test_nothing_outside_the_buffers_is_read_or_written(kind):
    """Fresh memory is NaN, every input stands between canaries, at any alignment."""
    for seed, case in enumerate(small(kind, 500, 5000)):
        margin = 64 + seed % 16
        inputs = [case.x.contiguous(), case.values, case.bias, case.dy, case.topology.index]
        wanted = operators(case, *inputs)
        with testing.poisoned_memory():
            pairs = [(None, lambda: True) if t is None else testing.guarded(t, margin) for t in inputs]
            results = operators(case, *(inner for inner, _ in pairs))
        for name, got, plain in zip(("y", "dx", "dvalues", "dbias"), results, wanted, strict=True):
            assert not bool(got.isnan().any()), f"{case.name}: NaN in {name}"
            assert torch.equal(got, plain), f"{case.name}: {name} depends on memory around its inputs"
        for (inner, intact), original in zip(pairs, inputs, strict=True):
            assert intact(), f"{case.name}: a canary was overwritten"
            assert original is None or torch.equal(inner, original), f"{case.name}: an input was modified"


def test_the_poison_and_the_canaries_work():
    with testing.poisoned_memory():
        assert bool(torch.empty(1000).isnan().all())
        assert bool(_ops.poison_outputs(True).isnan().all())
        inner, intact = testing.guarded(torch.zeros(3, 5))
        assert intact()
        outside = inner.as_strided((1,), (1,), inner.storage_offset() - 1)
        assert bool(outside.isnan())
        outside.zero_()
        assert not intact()
    assert not torch.are_deterministic_algorithms_enabled()


# values that are not finite -------------------------------------------------------------------

SPECIALS = (torch.nan, torch.inf, -torch.inf, 1e-42, -1e-42, 0.0, -0.0)


def spoil(tensor, rng, count):
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    for _ in range(min(count, tensor.numel())):
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice(SPECIALS)
    return tensor


def entries(topology):
    """Every stored weight as (group, out, in within the group, kh, kw), in value order, by definition."""
    b_out, b_in = topology.block_size
    kw = topology.shape[3] if len(topology.shape) == 4 else 1
    per_group = topology.shape[0] // topology.groups
    for position in topology.positions().tolist():
        row, col = divmod(position, topology.cols)
        inner, tap = divmod(col, topology.taps)
        for i in range(b_out):
            out = row * b_out + i
            for j in range(b_in):
                yield out // per_group, out, inner * b_in + j, tap // kw, tap % kw


def by_entry(case):
    """All products as sums over stored weights, in float64: 0 * NaN of an inactive weight never appears.

    Outside an image (x in its padding, dY beyond its edge) a stored weight meets zeros that count, as in a
    dense convolution: an infinite weight gives NaN there.
    """
    x, values, dy = case.x.double(), case.values.double().flatten(), case.dy.double()
    shape = case.topology.shape
    if case.conf is None:  # a 1x1 convolution over a line of tokens
        x, dy, shape = x.t()[None, :, :, None], dy.t()[None, :, :, None], (*shape, 1, 1)
    (sh, sw), (ph, pw), (dh, dw) = case.conf or kc.CONF
    far_h, far_w = shape[2] * dh + ph, shape[3] * dw + pw
    wide_x, wide_dy = F.pad(x, (pw, pw, ph, ph)), F.pad(dy, (far_w, far_w, far_h, far_h))
    y, dx, dvalues = torch.zeros_like(dy), torch.zeros_like(x), torch.zeros_like(values)
    if case.bias is not None:
        y += case.bias.double()[:, None, None]
    oh, ow = dy.shape[2:]
    for e, (group, out, inner, kh, kw) in enumerate(entries(case.topology)):
        channel, top, left = group * shape[1] + inner, kh * dh, kw * dw
        seen = wide_x[:, channel, top : top + (oh - 1) * sh + 1 : sh, left : left + (ow - 1) * sw + 1 : sw]
        y[:, out] += values[e] * seen
        dvalues[e] = (seen * dy[:, out]).sum()
        # The input pixels that this tap reads with the given stride, and the outputs that read them.
        h, w = (top - ph) % sh, (left - pw) % sw
        target = dx[:, channel, h::sh, w::sw]
        i, j = far_h + (h + ph - top) // sh, far_w + (w + pw - left) // sw
        target += values[e] * wide_dy[:, out, i : i + target.shape[1], j : j + target.shape[2]]
    if case.conf is None:
        y, dx = y[0, :, :, 0].t(), dx[0, :, :, 0].t()
    return {"y": y, "dx": dx, "dvalues": dvalues.view_as(case.values), "dbias": dy.sum((0, 2, 3))}


def few_entries(kind, count, first, dtype):
    found = 0
    for case in kc.cases(kind, dtype, 50 * count, first):
        if 0 < case.topology.nnz <= 250 and case.x.numel() < 20_000:
            yield found, case
            found += 1
            if found == count:
                return
    raise AssertionError("too few small cases")


@pytest.mark.parametrize("dtype", testing.NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("kind", list(kc.KINDS))
def test_non_finite_values_reach_exactly_what_an_active_weight_connects(kind, dtype):
    for seed, case in few_entries(kind, 200, 9000, dtype):
        rng = random.Random(seed)
        amounts = rng.choice(((3, 0, 0), (0, 2, 0), (0, 0, 3), (2, 1, 2), (20, 5, 20)))
        x, values, dy = (
            spoil(t, rng, n) for t, n in zip((case.x, case.values, case.dy), amounts, strict=True)
        )
        bias = None if case.bias is None else spoil(case.bias, rng, rng.choice((0, 1)))
        case = replace(case, x=x, values=values, dy=dy, bias=bias)
        results, exact = kc.run(case), by_entry(case)
        for name, result in results.items():
            testing.assert_same_nonfinite(result, exact[name], f"{case.name}, spoilt {amounts}: {name}")


@pytest.mark.parametrize("kind", list(kc.KINDS))
def test_the_entry_oracle_agrees_with_the_dense_one(kind):
    for _, case in few_entries(kind, 40, 9000, torch.float64):
        exact, magnitude = kc.oracle(case)
        explicit = by_entry(case)
        for name, value in exact.items():
            testing.assert_componentwise(explicit[name], value, magnitude[name], name=f"{case.name}: {name}")
