"""state_dict, copies, pickles and files: what one comparable package cannot do, and what must be refused."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import sparse_kernels as sk


def make(kind, seed=0, block_size=1, density=0.25):
    generator = torch.Generator().manual_seed(seed)
    options = {"density": density, "block_size": block_size, "generator": generator}
    if kind == "linear":
        return sk.SparseLinear(24, 16, **options)
    return sk.SparseConv2d(8, 16, 3, padding=1, groups=2, **options)


def sample(kind):
    size = (5, 24) if kind == "linear" else (2, 8, 6, 7)
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


def equal(one, other):
    tensors = [(m.values, m.bias, m.topology.index, m.mask()) for m in (one, other)]
    return all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


def shares_nothing(one, other):
    addresses = [{t.data_ptr() for t in (m.values, m.bias, m.topology.index)} for m in (one, other)]
    return not addresses[0] & addresses[1]


def train_a_little(layer, kind):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(sample(kind)).square().sum().backward()
    optimizer.step()
    topology = layer.topology
    free = torch.ones(topology.rows * topology.cols, dtype=torch.bool)
    free[topology.positions()] = False
    layer.update_topology(torch.tensor([1, 3]), free.nonzero().flatten()[:2])
    topology.validate()


CASES = pytest.mark.parametrize(
    ("kind", "block_size"), [("linear", 1), ("linear", (4, 2)), ("conv", 1), ("conv", 4)]
)


@CASES
def test_a_state_dict_restores_another_topology(kind, block_size):
    """Equal shape and sparsity, other positions: a peer refuses, because it does not store the indices."""
    saved, other = make(kind, 0, block_size), make(kind, 1, block_size)
    train_a_little(saved, kind)
    assert not torch.equal(saved.mask(), other.mask())
    values, addresses = other.values, (other.values.data_ptr(), other.topology.index.data_ptr())
    result = other.load_state_dict(saved.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert equal(saved, other)
    assert torch.equal(saved(sample(kind)), other(sample(kind)))
    assert other.values is values
    assert (values.data_ptr(), other.topology.index.data_ptr()) == addresses
    other.topology.validate()


@CASES
def test_a_state_dict_is_plain_independent_tensors(kind, block_size):
    layer = make(kind, 0, block_size)
    state = layer.state_dict()
    assert set(state) == {"values", "bias", "row_ptr", "col_idx", "weight_shape"}
    for tensor in state.values():
        assert tensor.layout == torch.strided
        assert tensor.is_contiguous()
    indices = {k: state[k].clone() for k in ("row_ptr", "col_idx")}
    train_a_little(layer, kind)
    for key, tensor in indices.items():
        assert torch.equal(state[key], tensor), "a later update changed a saved state"


@CASES
def test_safetensors_round_trip(kind, block_size, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    layer, other = make(kind, 0, block_size), make(kind, 1, block_size)
    net, twin = torch.nn.Sequential(layer, torch.nn.ReLU()), torch.nn.Sequential(other, torch.nn.ReLU())
    safetensors.save_file(net.state_dict(), tmp_path / "net.safetensors")
    twin.load_state_dict(safetensors.load_file(tmp_path / "net.safetensors"))
    assert equal(layer, other)
    other.topology.validate()
    safetensors.save_model(net, tmp_path / "model.safetensors")
    third = torch.nn.Sequential(make(kind, 2, block_size), torch.nn.ReLU())
    safetensors.load_model(third, tmp_path / "model.safetensors")
    assert equal(layer, third[0])


@CASES
def test_torch_save_of_the_state_loads_safely(kind, block_size):
    layer, other = make(kind, 0, block_size), make(kind, 1, block_size)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert equal(layer, other)


@CASES
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_whole_layers_are_copied(kind, block_size, how):
    """A peer's layers hold an object that cannot be pickled: no deepcopy, no torch.save(module)."""
    layer = make(kind, 0, block_size)
    train_a_little(layer, kind)
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert equal(layer, other)
    assert shares_nothing(layer, other)
    assert torch.equal(layer(sample(kind)), other(sample(kind)))
    before = layer.topology.index.clone()
    train_a_little(other, kind)
    assert torch.equal(layer.topology.index, before), "the copy's update changed the original"
    assert not equal(layer, other)


def test_an_averaged_copy_follows():
    """Exponential moving averages are made by deepcopy."""
    layer = make("linear")
    average = torch.optim.swa_utils.AveragedModel(layer)
    with torch.no_grad():
        layer.values.add_(1)
    average.update_parameters(layer)
    torch.testing.assert_close(average.module.values, layer.values)


# mismatches -----------------------------------------------------------------------------------


def snapshot(layer):
    return copy.deepcopy(layer)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make("linear", density=0.5), "shape"),
        (make("linear", block_size=4), "shape|values"),
        (sk.SparseLinear(24, 20, density=0.2), r"weight of shape \[20, 24\], not \[16, 24\]"),
        (sk.SparseLinear(96, 16, density=0.0625), "weight of shape"),
        (make("conv"), "weight of shape"),
    ],
    ids=["density", "block size", "rows", "columns", "kind"],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_state_of_another_layer_is_refused_whole(other, message, strict):
    layer = make("linear")
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match=message) as error:
        layer.load_state_dict(other.state_dict(), strict=strict)
    assert "the layer is unchanged" in str(error.value)
    assert equal(layer, before)


@pytest.mark.parametrize("kept", [("values", "bias"), ("row_ptr", "col_idx"), ("values", "row_ptr", "bias")])
@pytest.mark.parametrize("strict", [True, False])
def test_values_without_their_indices_are_refused(kept, strict):
    layer, other = make("linear", 0), make("linear", 1)
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match="values and indices belong together"):
        layer.load_state_dict({k: v for k, v in other.state_dict().items() if k in kept}, strict=strict)
    assert equal(layer, before)


def test_an_empty_state_is_missing_keys_and_nothing_else():
    layer = make("linear")
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match="Missing key.*values"):
        layer.load_state_dict({})
    result = layer.load_state_dict({}, strict=False)
    assert set(result.missing_keys) >= {"values", "bias"}
    assert equal(layer, before)


def test_strict_false_takes_what_is_there_and_reports_the_rest():
    net = torch.nn.Sequential(make("linear", 0), torch.nn.LayerNorm(16))
    other = torch.nn.Sequential(make("linear", 1), torch.nn.LayerNorm(16))
    state = {**other.state_dict(), "2.weight": torch.zeros(3), "0.extra": torch.zeros(3)}
    del state["1.weight"]
    with pytest.raises(RuntimeError, match="0.extra"):
        net.load_state_dict(state)
    net = torch.nn.Sequential(make("linear", 0), torch.nn.LayerNorm(16))
    result = net.load_state_dict(state, strict=False)
    assert set(result.unexpected_keys) == {"2.weight", "0.extra"}
    assert result.missing_keys == ["1.weight"]
    assert equal(net[0], other[0])


def test_a_nested_layer_gets_its_own_keys():
    """A prefix that begins another's must not confuse two layers."""

    class Two(torch.nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.fc, self.fc2 = make("linear", seed), make("linear", seed + 1)

    one, other = Two(0), Two(10)
    assert not one.load_state_dict(other.state_dict()).unexpected_keys
    assert equal(one.fc, other.fc)
    assert equal(one.fc2, other.fc2)


def test_moving_to_the_same_device_keeps_the_memory():
    layer = make("linear")
    address = layer.values.data_ptr(), layer.topology.index.data_ptr()
    layer.to("cpu")
    layer.float()
    assert (layer.values.data_ptr(), layer.topology.index.data_ptr()) == address


def test_loading_across_dtypes_casts():
    layer, other = make("linear", 0), make("linear", 1).double()
    other.load_state_dict(layer.state_dict())
    assert other.values.dtype == torch.float64
    assert torch.equal(other.values, layer.values.double())
    assert torch.equal(other.mask(), layer.mask())


@pytest.mark.parametrize(
    ("broken", "assign"), [("meta", False), ("sparse", False), ("sparse", True), ("integers", True)]
)
def test_a_tensor_that_cannot_be_copied_leaves_the_layer_whole(broken, assign):
    """New indices must not meet old values: a state is taken wholly or not at all."""
    layer = make("linear", 0)
    before, values = snapshot(layer), layer.values
    state = make("linear", 1).state_dict()
    change = {"meta": lambda t: t.to("meta"), "sparse": torch.Tensor.to_sparse, "integers": torch.Tensor.int}
    state["values"] = change[broken](state["values"])
    with pytest.raises(RuntimeError, match="values"):
        layer.load_state_dict(state, assign=assign)
    assert layer.values is values
    assert equal(layer, before)
    layer.topology.validate()


def test_a_state_of_another_architecture_is_named():
    """The same counts and index range, another kernel: a dense convolution raises, too."""
    wide, tall = sk.SparseConv2d(8, 16, (1, 3), density=0.25), sk.SparseConv2d(8, 16, (3, 1), density=0.25)
    with pytest.raises(RuntimeError, match=r"weight of shape \[16, 8, 1, 3\], not \[16, 8, 3, 1\]"):
        tall.load_state_dict(wide.state_dict())
    unlabelled = {k: v for k, v in tall.state_dict().items() if k != "weight_shape"}
    tall.load_state_dict(unlabelled)  # the label tells a mix-up; it is not needed


def test_sharing_memory_shares_the_indices_with_the_values():
    model = torch.nn.Sequential(make("linear"))
    model.share_memory()
    layer = model[0]
    assert layer.values.is_shared()
    assert all(getattr(layer.topology, name).is_shared() for name in ("index", "row_ptr", "col_idx"))
    layer.topology.validate()
