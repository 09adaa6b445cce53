"""Outputs and gradients of the layers against nn.Linear and nn.Conv2d with the masked weight, in float64."""

from __future__ import annotations

import pytest
import torch

import sparse_kernels as sk
from sparse_kernels import testing


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def build_linear(inner, out, pattern="uniform", block=1, bias=True, density=0.15):
    topology = testing.random_topology((out, inner), pattern, density, block, generator=seeded())
    dense = torch.nn.Linear(inner, out, bias, dtype=torch.float64)
    return sk.SparseLinear.from_dense(dense, mask=topology.mask(), block_size=block)


def build_conv(inner, out, kernel, pattern="uniform", block=1, density=0.15, groups=1, **options):
    topology = testing.random_topology(
        (out, inner // groups, *kernel), pattern, density, block, groups, seeded()
    )
    dense = torch.nn.Conv2d(inner, out, kernel, groups=groups, dtype=torch.float64, **options)
    return sk.SparseConv2d.from_dense(dense, mask=topology.mask(), block_size=block)


def check_against_masked_dense(layer, x, dtype, backend="auto"):
    """`layer` in float64 is the truth; the same in `dtype` is what is tested. Returns both outputs."""
    dense = layer.to_dense()
    exact_x = x.to(dtype).double().requires_grad_()
    layer = layer.to(dtype)
    dense.load_state_dict({k: v.to(dtype).double() for k, v in dense.state_dict().items()})
    exact = dense(exact_x)
    leaf = x.to(dtype).requires_grad_()
    assert leaf.stride() == x.stride() or not x.is_contiguous()
    with sk.use_backend(backend):
        y = layer(leaf)
        dy = torch.randn(exact.shape, generator=seeded(3), dtype=torch.float64).to(dtype)
        y.backward(dy)
    exact.backward(dy.double())
    assert y.dtype == dtype
    topology = layer.topology
    pairs = {"y": (y, exact), "dx": (leaf.grad, exact_x.grad)}
    pairs["dvalues"] = (layer.values.grad, topology.gather(dense.weight.grad))
    if layer.bias is not None:
        pairs["dbias"] = (layer.bias.grad, dense.bias.grad)
    for name, (ours, theirs) in pairs.items():
        assert ours is not None, f"{name} is None"
        testing.assert_normwise(ours, theirs, name=name)
    return y, exact


LINEAR = {
    "plain": ((64, 48), (10,), {}),
    "ragged": ((37, 53), (29,), {}),
    "prime, wide": ((257, 11), (7,), {}),
    "empty rows": ((40, 30), (8,), {"pattern": "empty_rows"}),
    "empty columns": ((40, 30), (8,), {"pattern": "empty_cols"}),
    "nnz 0": ((40, 30), (8,), {"pattern": "none"}),
    "nnz 1": ((40, 30), (8,), {"pattern": "one"}),
    "nnz all": ((40, 30), (8,), {"pattern": "all"}),
    "skewed": ((90, 70), (33,), {"pattern": "skew"}),
    "batch 0": ((40, 30), (0,), {}),
    "batch 1": ((40, 30), (1,), {}),
    "1-D": ((40, 30), (), {}),
    "3-D": ((40, 30), (4, 5), {}),
    "4-D": ((40, 30), (2, 3, 5), {}),
    "4-D, empty": ((40, 30), (2, 0, 5), {}),
    "no bias": ((40, 30), (8,), {"bias": False}),
    "blocks": ((48, 32), (17,), {"block": 4}),
    "blocks of 16": ((64, 96), (17,), {"block": 16}),
    "oblong blocks": ((45, 32), (17,), {"block": (8, 3)}),
    "blocks, nnz 0": ((48, 32), (17,), {"block": 4, "pattern": "none"}),
    "blocks, nnz all": ((48, 32), (3, 5), {"block": 4, "pattern": "all"}),
    "blocks, empty rows": ((48, 32), (17,), {"block": 4, "pattern": "empty_rows"}),
}


@pytest.mark.parametrize("backend", ["auto", "cpu", "dense"])
@pytest.mark.parametrize("dtype", testing.NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("name", LINEAR)
def test_linear(name, dtype, backend):
    (inner, out), lead, options = LINEAR[name]
    x = torch.randn(*lead, inner, generator=seeded(1), dtype=torch.float64)
    check_against_masked_dense(build_linear(inner, out, **options), x, dtype, backend)


@pytest.mark.parametrize("dtype", testing.NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["transposed", "step", "middle", "expanded"])
def test_linear_inputs_of_any_stride(layout, dtype):
    x = torch.randn(6, 5, 40, generator=seeded(1), dtype=dtype)
    if layout == "transposed":
        x = torch.randn(40, 6, generator=seeded(1), dtype=dtype).t()
    elif layout == "step":
        x = torch.randn(6, 80, generator=seeded(1), dtype=dtype)[:, ::2]
    elif layout == "middle":
        x = x.transpose(0, 1)
    else:
        x = x[:1].expand(6, 5, 40)
    check_against_masked_dense(build_linear(40, 30), x.detach(), dtype)


CONV = {
    "plain": ((6, 10, (3, 3)), (4, 9, 9), {"padding": 1}),
    "1x1": ((13, 7, (1, 1)), (3, 5, 6), {}),
    "ragged": ((5, 11, (3, 3)), (3, 7, 13), {"padding": 1}),
    "asymmetric kernel": ((6, 8, (5, 2)), (2, 9, 8), {"padding": (2, 1)}),
    "row kernel": ((6, 8, (1, 3)), (2, 9, 8), {"padding": (0, 1)}),
    "stride 2": ((6, 8, (3, 3)), (2, 9, 10), {"stride": 2, "padding": 1}),
    "mixed stride": ((6, 8, (3, 3)), (2, 9, 10), {"stride": (1, 3), "padding": (1, 0)}),
    "1x1, stride 2": ((6, 8, (1, 1)), (2, 9, 10), {"stride": 2}),
    "dilation 2": ((6, 8, (3, 3)), (2, 9, 10), {"dilation": 2, "padding": 2}),
    "mixed dilation": ((6, 8, (3, 2)), (2, 9, 10), {"dilation": (1, 3), "padding": (1, 2), "stride": (2, 1)}),
    "groups": ((6, 9, (3, 3)), (2, 8, 8), {"groups": 3, "padding": 1}),
    "depthwise": ((8, 8, (3, 3)), (2, 8, 8), {"groups": 8, "padding": 1, "density": 0.5}),
    "same": ((6, 8, (3, 3)), (2, 9, 8), {"padding": "same"}),
    "same, even kernel": ((6, 8, (4, 2)), (2, 9, 8), {"padding": "same"}),
    "same, dilated": ((6, 8, (3, 2)), (2, 9, 8), {"padding": "same", "dilation": (2, 3)}),
    "valid": ((6, 8, (3, 3)), (2, 9, 8), {"padding": "valid"}),
    "circular": ((6, 8, (3, 3)), (2, 9, 8), {"padding": (2, 1), "padding_mode": "circular"}),
    "reflect": ((6, 8, (3, 3)), (2, 9, 8), {"padding": (2, 1), "padding_mode": "reflect"}),
    "replicate": ((6, 8, (3, 3)), (2, 9, 8), {"padding": (2, 1), "padding_mode": "replicate", "stride": 2}),
    "circular, same": ((6, 8, (4, 3)), (2, 9, 8), {"padding": "same", "padding_mode": "circular"}),
    "nnz 0": ((6, 8, (3, 3)), (2, 9, 8), {"pattern": "none"}),
    "nnz all": ((6, 8, (3, 3)), (2, 9, 8), {"pattern": "all"}),
    "empty rows": ((6, 8, (3, 3)), (2, 9, 8), {"pattern": "empty_rows"}),
    "empty columns": ((6, 8, (3, 3)), (2, 9, 8), {"pattern": "empty_cols"}),
    "skewed": ((16, 24, (3, 3)), (2, 9, 8), {"pattern": "skew", "padding": 1}),
    "batch 0": ((6, 8, (3, 3)), (0, 9, 8), {}),
    "batch 1": ((6, 8, (3, 3)), (1, 9, 8), {}),
    "unbatched": ((6, 8, (3, 3)), (9, 8), {"padding": 1}),
    "unbatched, circular": ((6, 8, (3, 3)), (9, 8), {"padding": 1, "padding_mode": "circular"}),
    "no bias": ((6, 8, (3, 3)), (2, 9, 8), {"bias": False}),
    "blocks": ((8, 16, (3, 3)), (2, 9, 8), {"block": 4, "padding": 1}),
    "blocks of 16, groups": (
        (32, 64, (3, 3)),
        (2, 6, 5),
        {"block": 16, "groups": 2, "padding": 1, "density": 0.3},
    ),
    "oblong blocks, stride 2": ((6, 16, (3, 3)), (2, 9, 8), {"block": (8, 3), "stride": 2}),
    "blocks, nnz 0": ((8, 16, (3, 3)), (2, 9, 8), {"block": 4, "pattern": "none"}),
}


def image(inner, size, layout, dtype=torch.float64):
    size = (*size[:-2], inner, *size[-2:])
    x = torch.randn(size, generator=seeded(1), dtype=dtype)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last) if len(size) == 4 else x
    if layout == "step":
        return torch.randn(*size[:-1], 2 * size[-1], generator=seeded(1), dtype=dtype)[..., ::2]
    if layout == "transposed":
        return torch.randn(*size[:-2], size[-1], size[-2], generator=seeded(1), dtype=dtype).transpose(-1, -2)
    return x


# torch's own advice about its dense layer
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("backend", ["auto", "cpu", "dense"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", testing.NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("name", CONV)
def test_conv(name, dtype, layout, backend):
    (inner, out, kernel), size, options = CONV[name]
    x = image(inner, size, layout, dtype)
    layer = build_conv(inner, out, kernel, **options)
    ours, theirs = check_against_masked_dense(layer, x, dtype, backend)
    assert ours.shape == theirs.shape
    if ours.numel():
        assert ours.stride() == layer.to_dense()(x).stride(), "another memory format than nn.Conv2d's"


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("dtype", testing.NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["step", "transposed"])
@pytest.mark.parametrize(
    "name", ["plain", "stride 2", "unbatched", "circular", "same, even kernel", "blocks"]
)
def test_conv_inputs_of_any_stride(name, layout, dtype):
    (inner, out, kernel), size, options = CONV[name]
    check_against_masked_dense(
        build_conv(inner, out, kernel, **options), image(inner, size, layout, dtype), dtype
    )


def test_a_deep_net_has_the_gradients_of_its_dense_twin():
    """Every layer of a small ResNet-like net at once, with batch norm in between."""
    torch.manual_seed(0)
    sparse = torch.nn.Sequential(
        sk.SparseConv2d(3, 16, 3, padding=1, density=0.3),
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU(),
        sk.SparseConv2d(16, 32, 3, stride=2, padding=1, density=0.1, bias=False),
        torch.nn.ReLU(),
        sk.SparseConv2d(32, 32, 1, density=0.2, block_size=4),
        torch.nn.Flatten(),
        sk.SparseLinear(32 * 16, 10, density=0.05),
    ).double()
    dense = torch.nn.Sequential(*(m.to_dense() if hasattr(m, "to_dense") else m for m in sparse))
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    sparse(x).square().sum().backward()
    dense(x).square().sum().backward()
    for ours, theirs in zip(sparse, dense, strict=True):
        if ours is not theirs:
            testing.assert_normwise(ours.values.grad, ours.topology.gather(theirs.weight.grad))
