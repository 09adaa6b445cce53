"""The layers' contract: attributes, counts, conversions, errors, casts."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

import sparse_kernels as sk
from sparse_kernels import backend, testing


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make(kind, block_size=1, density=0.25, **options):
    if kind == "linear":
        return sk.SparseLinear(24, 16, density=density, block_size=block_size, generator=seeded(), **options)
    return sk.SparseConv2d(
        8, 16, 3, padding=1, density=density, block_size=block_size, generator=seeded(), **options
    )


def sample(kind, dtype=torch.float32, seed=1):
    size = (5, 24) if kind == "linear" else (2, 8, 6, 7)
    return torch.randn(size, generator=seeded(seed), dtype=dtype)


KINDS = ("linear", "conv")


def test_linear_has_the_attributes_of_nn_linear():
    layer, dense = sk.SparseLinear(5, 3, density=0.5), torch.nn.Linear(5, 3)
    for name in ("in_features", "out_features", "training"):
        assert getattr(layer, name) == getattr(dense, name)
    assert layer.bias.shape == dense.bias.shape
    assert sk.SparseLinear(5, 3, False, density=0.5).bias is None
    assert sk.SparseLinear(5, 3, bias=False, density=0.5).bias is None


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2}, {"stride": (1, 2), "padding": (0, 1)}, {"padding": "same", "dilation": 2},
     {"groups": 2}, {"padding": 1, "padding_mode": "circular"}, {"bias": False}],
)  # fmt: skip
def test_conv_has_the_attributes_of_nn_conv2d(options):
    layer, dense = (
        sk.SparseConv2d(4, 6, (3, 1), density=0.5, **options),
        torch.nn.Conv2d(4, 6, (3, 1), **options),
    )
    names = "in_channels out_channels kernel_size stride padding dilation groups padding_mode training "
    for name in (names + "transposed output_padding").split():
        assert getattr(layer, name) == getattr(dense, name), name
    assert (layer.bias is None) == (dense.bias is None)
    assert layer.mask().shape == dense.weight.shape


def test_positional_arguments_are_those_of_the_dense_layers():
    layer = sk.SparseConv2d(4, 6, 3, 2, 1, 2, 2, False, "reflect", density=0.5)
    assert (layer.stride, layer.padding, layer.dilation) == ((2, 2), (1, 1), (2, 2))
    assert (layer.groups, layer.bias, layer.padding_mode) == (2, None, "reflect")
    with pytest.raises(TypeError, match="density"):
        sk.SparseLinear(4, 6)


def test_repr_says_what_is_stored():
    assert repr(sk.SparseLinear(10, 20, density=0.1)) == (
        "SparseLinear(in_features=10, out_features=20, bias=True, CSR, density=0.1, nnz=20)"
    )
    text = repr(sk.SparseConv2d(8, 16, 3, stride=2, density=0.25, block_size=(4, 2), bias=False))
    for part in (
        "8, 16",
        "kernel_size=(3, 3)",
        "stride=(2, 2)",
        "BSR 4x2",
        "density=0.25",
        "nnz=288",
        "bias=False",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("density", "block_size", "nnz"),
    [(0.1, 1, 100), (0.2, 1, 200), (0.0, 1, 0), (1.0, 1, 1000), (0.001, 1, 1), (0.0001, 1, 1), (0.3, 5, 300),
     (0.33, (2, 5), 330)],
)  # fmt: skip
def test_density_is_exact(density, block_size, nnz):
    layer = sk.SparseLinear(50, 20, density=density, block_size=block_size)
    assert layer.nnz == nnz == int(layer.mask().sum()) == layer.values.numel()
    assert layer.density == pytest.approx(nnz / 1000)
    assert layer.block_size == block_size
    expected = (nnz,) if block_size == 1 else (nnz // layer.topology.block_numel, *layer.topology.block_size)
    assert layer.values.shape == expected


def test_initial_values_have_the_scale_of_the_dense_layer():
    layer, dense = sk.SparseLinear(400, 300, density=0.2), torch.nn.Linear(400, 300)
    assert layer.values.std().item() == pytest.approx(dense.weight.std().item(), rel=0.05)
    assert layer.bias.abs().max().item() <= 1 / 20
    again = [make("linear").values for _ in range(2)]
    assert torch.equal(*again)


@pytest.mark.parametrize("block_size", [1, 4, (8, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_dense_weight_is_differentiable_and_round_trips(kind, block_size):
    layer = make(kind, block_size)
    weight, mask = layer.dense_weight(), layer.mask()
    assert mask.dtype == torch.bool
    assert bool((weight[~mask] == 0).all())
    probe = torch.randn(weight.shape, generator=seeded(4))
    (weight * probe).sum().backward()
    assert torch.equal(layer.values.grad, layer.topology.gather(probe))
    dense = layer.to_dense().eval()
    x = sample(kind)
    torch.testing.assert_close(layer(x), dense(x))
    back = type(layer).from_dense(dense, mask=mask, block_size=block_size)
    assert torch.equal(back.dense_weight(), weight)
    assert torch.equal(back.bias, layer.bias)
    assert torch.equal(back.topology.index, layer.topology.index)
    assert not back.training, "the training flag is part of the module"


@pytest.mark.parametrize("kind", KINDS)
def test_from_dense_keeps_the_values_at_the_active_positions(kind):
    dense = torch.nn.Linear(24, 16) if kind == "linear" else torch.nn.Conv2d(8, 16, 3, groups=2, dilation=2)
    dense.weight.requires_grad_(False)
    cls = sk.SparseLinear if kind == "linear" else sk.SparseConv2d
    before = dense.weight.clone()
    layer = cls.from_dense(dense, density=0.3, generator=seeded())
    assert torch.equal(layer.dense_weight(), torch.where(layer.mask(), dense.weight, 0))
    assert layer.nnz == dense.weight.numel() - int(0.7 * dense.weight.numel() + 1e-6)
    assert torch.equal(dense.weight, before)
    assert not layer.values.requires_grad
    assert layer.bias.requires_grad
    assert layer.bias.data_ptr() != dense.bias.data_ptr()
    again = cls.from_dense(dense, density=0.3, generator=seeded())
    assert torch.equal(again.mask(), layer.mask())


def test_from_dense_says_what_it_needs():
    dense = torch.nn.Linear(8, 4)
    for options in ({}, {"mask": torch.ones(4, 8, dtype=torch.bool), "density": 0.5}):
        with pytest.raises(ValueError, match="exactly one of mask= and density="):
            sk.SparseLinear.from_dense(dense, **options)
    with pytest.raises(ValueError, match=r"mask must have the weight's shape \(4, 8\), got \(8, 4\)"):
        sk.SparseLinear.from_dense(dense, mask=torch.ones(8, 4, dtype=torch.bool))
    ragged = torch.ones(4, 8, dtype=torch.bool)
    ragged[0, 0] = False
    with pytest.raises(ValueError, match="not made of whole blocks"):
        sk.SparseLinear.from_dense(dense, mask=ragged, block_size=2)
    with pytest.raises(ValueError, match="bool tensor, or hold 0 and 1"):
        sk.SparseLinear.from_dense(dense, mask=torch.full((4, 8), 0.5))
    with pytest.raises(TypeError, match="expected an nn.Linear, got Conv2d"):
        sk.SparseLinear.from_dense(torch.nn.Conv2d(4, 4, 1), density=0.5)
    with pytest.raises(TypeError, match="expected an nn.Conv2d, got Linear"):
        sk.SparseConv2d.from_dense(dense, density=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_values_keep_their_identity_through_training_and_updates(kind):
    layer = make(kind)
    values, address, shape = layer.values, layer.values.data_ptr(), layer.values.shape
    optimizer = torch.optim.Adam(layer.parameters())
    layer(sample(kind)).square().sum().backward()
    optimizer.step()
    free = (~layer.mask()).flatten().nonzero().flatten()[:3]
    layer.update_topology(torch.tensor([0, 2, 5]), free)
    layer.load_state_dict(layer.state_dict())
    layer.train().eval().requires_grad_(True)
    assert layer.values is values
    assert (values.data_ptr(), values.shape) == (address, shape)
    assert dict(layer.named_parameters()).keys() == {"values", "bias"}


# bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((10, 12), {"density": 1.5}, r"density must be a number in \[0, 1\], got 1.5"),
        ((10, 12), {"density": -0.1}, "density"),
        ((10, 12), {"density": float("nan")}, "density"),
        ((10, 12), {"density": 0.5, "block_size": 4}, "the in dimension 10; sizes that fit: 1, 2"),
        ((12, 10), {"density": 0.5, "block_size": (4, 4)}, "the out dimension 10; sizes that fit: 1, 2"),
        ((9, 9), {"density": 0.5, "block_size": 2}, "sizes that fit: 1, 3, 9$"),
        ((9, 4), {"density": 0.5, "block_size": 2}, "sizes that fit: 1$"),  # both ways
        ((9, 4), {"density": 0.5, "block_size": (4, 2)}, "the in dimension 9; sizes that fit: 1, 3, 9$"),
        ((10**6, 10**6), {"density": 0.01}, "10000000000 active positions exceed the int32 index range"),
        ((10, 12), {"density": 0.5, "dtype": torch.complex64}, "float32, float64.*complex64"),
        ((10, 12), {"density": 0.5, "block_size": 0}, "block_size"),
        ((10, 12), {"density": 0.5, "block_size": -2}, "block_size"),
        ((10, 12), {"density": 0.5, "block_size": 2.0}, "block_size"),
        ((-1, 12), {"density": 0.5}, "-1"),
    ],
)  # fmt: skip
def test_bad_linear_arguments_are_named(arguments, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sk.SparseLinear(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((4, 6, 3), {"groups": 3}, "groups must divide in_channels and out_channels, got 3 for 4 and 6"),
        ((4, 6, 3), {"groups": 0}, "groups"),
        ((4, 6, 3), {"padding_mode": "mirror"}, "one of zeros, reflect, replicate, circular"),
        ((4, 6, 3), {"padding": "full"}, "padding"),
        ((4, 6, 3), {"padding": "same", "stride": 2}, "stride 1"),
        ((4, 6, 3), {"block_size": 4}, "out dimension 6; sizes that fit: 1, 2"),
        ((8, 8, 3), {"block_size": 8, "groups": 2}, "per group; sizes that fit: 1, 2, 4"),
        ((4, 6, 3), {"density": 2}, "density"),
        ((4, 6, 0), {}, "kernel_size"),
        ((4, 6, 3.0), {}, "kernel_size must be an int or a pair of them, got 3.0"),
        ((4, 6, (3, 3, 3)), {}, r"kernel_size must be an int or a pair of them, got \(3, 3, 3\)"),
        ((4, 6, 3), {"stride": (1.5, 1.5)}, "stride must be an int or a pair"),
        ((4, 6, 3), {"stride": 0}, "stride"),
        ((4, 6, 3), {"dilation": 0}, "dilation"),
        ((4, 6, 3), {"padding": -1}, "padding"),
    ],
)  # fmt: skip
def test_bad_conv_arguments_are_named(arguments, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sk.SparseConv2d(*arguments, **{"density": 0.5, **options})


@pytest.mark.parametrize(
    ("kind", "x", "error", "message"),
    [
        ("linear", torch.zeros(5, 23), ValueError, r"shape \[\*, 24\].*got \[5, 23\]"),
        ("linear", torch.zeros(()), ValueError, "got"),
        ("linear", torch.zeros(5, 24, dtype=torch.int64), TypeError, "floating point.*int64"),
        ("linear", torch.zeros(5, 24, dtype=torch.complex64), TypeError, "complex64"),
        ("linear", torch.zeros(5, 24, dtype=torch.float64), TypeError, "float64.*float32"),
        ("linear", torch.zeros(5, 24, device="meta"), ValueError, "meta.*cpu"),
        ("linear", [1.0] * 24, TypeError, "list"),
        ("linear", torch.zeros(5, 24).to_sparse(), TypeError, "strided.*sparse_coo"),
        ("conv", torch.zeros(2, 7, 6, 6), ValueError, r"\[n, 8, h, w\].*got \[2, 7, 6, 6\]"),
        ("conv", torch.zeros(8, 6), ValueError, r"got \[8, 6\]"),
        ("conv", torch.zeros(1, 2, 8, 6, 6), ValueError, "got"),
        ("conv", torch.zeros(2, 8, 6, 6, dtype=torch.bool), TypeError, "floating point.*bool"),
        ("conv", torch.zeros(2, 8, 6, 6, dtype=torch.float16), TypeError, "float16.*float32"),
        ("conv", torch.zeros(2, 8, 6, 6, device="meta"), ValueError, "meta.*cpu"),
        ("conv", torch.zeros(2, 8, 0, 6), ValueError, "empty"),
    ],
)
def test_bad_inputs_are_named(kind, x, error, message):
    with pytest.raises(error, match=message):
        make(kind)(x)


def test_functional_checks_its_parts():
    topology = sk.Topology.random((6, 8), 0.5, generator=seeded())
    image = sk.Topology.random((6, 4, 3, 3), 0.5, groups=2, generator=seeded())
    x, values, filters = torch.zeros(3, 8), torch.zeros(topology.nnz), torch.zeros(image.nnz)
    linear, conv2d = sk.functional.linear, sk.functional.conv2d
    with pytest.raises(ValueError, match=r"values must have shape \(24,\)"):
        linear(x, values[:-1], topology)
    with pytest.raises(ValueError, match=r"bias must have shape \(6,\), got \(5,\)"):
        linear(x, values, topology, torch.zeros(5))
    with pytest.raises(TypeError, match="bias.*float32.*float64"):
        linear(x, values, topology, torch.zeros(6, dtype=torch.float64))
    with pytest.raises(ValueError, match="Linear"):
        linear(x, filters, image)
    with pytest.raises(ValueError, match="Conv2d"):
        conv2d(torch.zeros(1, 8, 5, 5), values, topology)
    with pytest.raises(ValueError, match="groups is 1.*groups = 2"):
        conv2d(torch.zeros(1, 8, 5, 5), filters, image)
    with pytest.raises(ValueError, match="stride"):
        conv2d(torch.zeros(1, 8, 5, 5), filters, image, stride=0, groups=2)
    with pytest.raises(ValueError, match="padding"):
        conv2d(torch.zeros(1, 8, 5, 5), filters, image, padding=-1, groups=2)
    with pytest.raises(ValueError, match='padding="same" needs stride 1'):
        conv2d(torch.zeros(1, 8, 5, 5), filters, image, stride=2, padding="same", groups=2)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),  # which leaves float64 alone
        pytest.raises(TypeError, match="values must have the dtype of x, torch.float64, got torch.float32"),
    ):
        linear(x.double(), values, topology)


def test_numbers_of_numpy_are_numbers():
    layer = sk.SparseLinear(12, 8, density=np.float32(0.5), block_size=np.int64(2))
    assert (layer.nnz, layer.block_size) == (48, 2)
    assert sk.SparseConv2d(4, 8, np.int64(3), density=0.5).kernel_size == (3, 3)


def test_backends_are_checked_and_restored():
    layer, x = make("linear"), sample("linear")
    with (
        pytest.raises(ValueError, match="backend must be one of .*reference.*got 'gpu'"),
        sk.use_backend("gpu"),
    ):
        pass
    for name in ("triton", "cuda"):
        with sk.use_backend(name), pytest.raises(RuntimeError, match=f'"{name}" cannot run'):
            layer(x)
    results = []
    for name in ("reference", "cpu", "dense", "auto"):
        with sk.use_backend(name):
            results.append(layer(x))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_code_is_not_left_with_another_threads_backend(kind):
    """One thread leaves its `with` while another is inside its own: then all is as it was."""
    entered, inside, left = (threading.Event() for _ in range(3))

    def outer():
        with sk.use_backend("reference"):
            entered.set()
            inside.wait()
        left.set()

    def inner():
        entered.wait()
        with sk.use_backend("dense"):
            inside.set()
            left.wait()

    threads = [threading.Thread(target=target) for target in (outer, inner)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (backend._requested.get(), backend._latest) == ("auto", "auto")


# casts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_to_dtype(kind, dtype):
    layer = make(kind).to(dtype)
    assert layer.values.dtype == layer.bias.dtype == dtype
    assert layer.topology.index.dtype == torch.int32
    x = sample(kind, dtype).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == layer.values.grad.dtype == dtype
    exact = layer.double()(x.detach().double())
    torch.testing.assert_close(
        y.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_follows_the_dense_layer(kind, dtype):
    """A peer raises TypeError here."""
    layer = make(kind)
    dense = layer.to_dense()
    x = sample(kind).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y, theirs = layer(x), dense(x)
    assert y.dtype == theirs.dtype == dtype
    y.float().square().sum().backward()
    assert x.grad.dtype == layer.values.grad.dtype == torch.float32
    exact = layer.to_dense().double()(x.detach().double())
    error, reference = ((r.double() - exact).abs().max().item() for r in (y, theirs))
    assert error <= max(2 * reference, torch.finfo(dtype).eps * exact.abs().max().item())
    with torch.autocast("cpu", dtype=dtype, enabled=False):
        assert layer(x).dtype == torch.float32
    with torch.autocast("cpu", dtype=dtype):
        half = layer(x.detach().to(dtype))
    assert half.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_backend_trains_under_autocast(kind):
    layer = make(kind)
    results = []
    for name in ("cpu", "dense"):
        layer.zero_grad()
        x = sample(kind).requires_grad_()
        with sk.use_backend(name), torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
            y.float().square().sum().backward()
        assert y.dtype == torch.bfloat16
        results.append((y.detach(), x.grad, layer.values.grad, layer.bias.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("size", [(2, 1, 6, 5), (2, 4, 1, 1), (1, 4, 6, 5), (1, 1, 1, 1), (2, 4, 6, 5)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_output_has_the_memory_format_of_a_dense_layers(size, layout):
    """Also where the input fits both, for having one channel or one pixel."""
    x = torch.randn(size).to(memory_format=layout)
    layer = sk.SparseConv2d(size[1], 8, 3, padding=1, density=0.5)
    y, wanted = layer(x), layer.to_dense()(x)
    assert y.stride() == wanted.stride()
    testing.assert_normwise(y, wanted.detach())
    y.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_factory_arguments(kind):
    layer = make(kind, dtype=torch.float64, device="cpu")
    assert layer.values.dtype == layer.bias.dtype == torch.float64
    testing.assert_normwise(layer(sample(kind, torch.float64)), layer.to_dense()(sample(kind, torch.float64)))
