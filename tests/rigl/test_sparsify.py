"""`sparsify`, `layer_sparsities`, `densify`, `summary`."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import rigl
from sparse_kernels import SparseConv2d, SparseLinear


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.body = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.grouped = nn.Conv2d(32, 32, 1, groups=2)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grouped(self.body(self.depthwise(self.stem(x))))
        return self.head(x.mean((2, 3)))


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def test_kinds_of_layers_and_exact_counts() -> None:
    model = ConvNet()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert rigl.sparsify(model, sparsity=0.75, distribution="uniform") is model
    assert type(model.stem) is nn.Conv2d  # first layer, uniform
    assert type(model.depthwise) is nn.Conv2d
    for name in ("body.0", "grouped"):
        layer = model.get_submodule(name)
        assert type(layer) is SparseConv2d
        weight = before[f"{name}.weight"]
        assert layer.nnz == weight.numel() - int(0.75 * weight.numel())
        torch.testing.assert_close(layer.dense_weight().detach(), weight * layer.mask(), rtol=0, atol=0)
    assert type(model.head) is SparseLinear
    assert torch.equal(model.head.bias, before["head.bias"])
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def test_erk_keeps_capped_layers_dense_and_the_plan_tells() -> None:
    model = ConvNet()
    plan = rigl.layer_sparsities(model, sparsity=0.7)
    assert list(plan) == ["stem", "depthwise", "body.0", "grouped", "head"]
    assert plan["depthwise"] == plan["head"] == 0.0
    assert type(model.head) is nn.Linear  # the plan changes nothing
    rigl.sparsify(model, sparsity=0.7)
    assert type(model.head) is nn.Linear
    assert type(model.stem) is SparseConv2d
    for row in rigl.summary(model):
        if row.format != "dense":
            assert row.density == pytest.approx(1 - plan[row.name], abs=1 / row.nnz)


def test_dense_first() -> None:
    def first(**kwargs: object) -> type:
        return type(rigl.sparsify(mlp(64, 64, 64), sparsity=0.9, **kwargs)[0])  # type: ignore[arg-type]

    assert first(distribution="uniform") is nn.Linear
    assert first(distribution="erk") is SparseLinear
    assert first(distribution="uniform", dense_first=False) is SparseLinear
    assert first(distribution="erk", dense_first=True) is nn.Linear
    assert first(distribution="uniform", custom={"0": 0.5}) is SparseLinear


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_the_root_is_returned_converted(distribution: str) -> None:
    layer = rigl.sparsify(nn.Linear(40, 50), sparsity=0.9, distribution=distribution)
    assert isinstance(layer, SparseLinear)
    assert layer.nnz == 200
    assert type(rigl.densify(layer)) is nn.Linear


def test_dense_patterns_and_custom() -> None:
    model = nn.ModuleDict({"enc": mlp(32, 32, 32), "dec": mlp(32, 32, 32), "head": nn.Linear(32, 8)})
    rigl.sparsify(model, sparsity=0.8, dense=["enc", "he*"], custom={"dec.0": 0.5})
    kinds = {r.name: (r.format, r.density) for r in rigl.summary(model)}
    assert [kinds[n][0] for n in ("enc.0", "enc.2", "head")] == ["dense"] * 3
    assert kinds["dec.0"] == ("CSR", 0.5)
    assert kinds["dec.2"] == ("CSR", pytest.approx(0.2, abs=1e-3))
    single = rigl.sparsify(mlp(32, 32, 32), sparsity=0.8, dense="0")
    assert type(single[0]) is nn.Linear


def test_a_shared_module_is_converted_once() -> None:
    layer = nn.Linear(32, 32)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    rigl.sparsify(model, sparsity=0.9)
    assert isinstance(model[0], SparseLinear)
    assert model[0] is model[2]
    rigl.densify(model)
    assert model[0] is model[2]


def test_tied_weights_stay_dense_with_a_warning() -> None:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(50, 32), "body": nn.Linear(32, 32), "head": nn.Linear(32, 50)}
    )
    model["head"].weight = model["embed"].weight
    with pytest.warns(UserWarning, match="'head' shares its weight"):
        rigl.sparsify(model, sparsity=0.8)
    assert model["head"].weight is model["embed"].weight
    assert isinstance(model["body"], SparseLinear)


def test_what_the_warning_about_tied_weights_says_can_be_done() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(9, 32), "body": nn.Linear(32, 32), "head": nn.Linear(32, 9)})
    model["head"].weight = model["embed"].weight
    rigl.sparsify(model, sparsity=0.8, dense="head")  # warnings are errors here
    assert isinstance(model["body"], SparseLinear)


def test_modules_go_by_all_their_names() -> None:
    """A shared layer by its second one, a module that holds no replaceable layer by its own."""
    layer = nn.Linear(32, 32)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(32, 32))
    rigl.sparsify(model, sparsity=0.8, dense=["2", "1"])
    assert [r.format for r in rigl.summary(model)] == ["dense", "CSR"]
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(32, 32))
    assert rigl.layer_sparsities(model, sparsity=0.8, custom={"2": 0.5})["0"] == 0.5
    with pytest.warns(UserWarning, match=r"dense='fc\*' fits no module"):
        rigl.sparsify(model, sparsity=0.8, dense="fc*")


def test_hooks_stay_with_their_layer() -> None:
    model, calls = mlp(16, 32, 8), []
    handle = model[0].register_forward_hook(lambda module, args, y: calls.append(type(module).__name__))
    model[0].register_full_backward_hook(lambda module, gx, gy: calls.append("backward"))
    rigl.sparsify(model, sparsity=0.5, distribution="uniform", dense_first=False)
    model(torch.randn(2, 16, requires_grad=True)).sum().backward()
    assert calls == ["SparseLinear", "backward"]
    rigl.densify(model)
    handle.remove()
    model(torch.randn(2, 16, requires_grad=True)).sum().backward()
    assert calls == ["SparseLinear", "backward", "backward"]


def test_transformer_layers_work_in_training_and_inference() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the construction of a nested-tensor encoder talks
        model = nn.TransformerEncoder(layer, 2)
    rigl.sparsify(model, sparsity=0.5)
    names = [r.name for r in rigl.summary(model) if r.format == "CSR"]
    assert names == ["layers.0.linear1", "layers.0.linear2", "layers.1.linear1", "layers.1.linear2"]
    x = torch.randn(2, 5, 32)
    trained = model(x)
    with torch.inference_mode():
        served = model.eval()(x)
    torch.testing.assert_close(served, trained.detach())
    padded = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.inference_mode():
        short = model(x, src_key_padding_mask=padded)
    torch.testing.assert_close(short[0], served[0])


def test_an_encoder_of_layers_of_ones_own() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = nn.MultiheadAttention(32, 4, batch_first=True)
            self.linear = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
            return x + self.linear(x)

    model = nn.TransformerEncoder(Block(), 2, enable_nested_tensor=False)  # type: ignore[arg-type]
    rigl.sparsify(model, sparsity=0.5)
    assert model.eval()(torch.randn(2, 5, 32)).shape == (2, 5, 32)


def test_computed_weights_stay() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)), nn.Linear(16, 16))
    rigl.sparsify(model, sparsity=0.5)
    assert not isinstance(model[0], SparseLinear)
    assert isinstance(model[1], SparseLinear)


def test_blocks_fall_back() -> None:
    model = nn.ModuleDict(
        {
            "fits": nn.Linear(256, 256),
            "smaller": nn.Linear(1024, 24),  # 8 is the largest block that divides both
            "none": nn.Linear(255, 256),
            "conv": nn.Conv2d(64, 96, 3),
        }
    )
    rigl.sparsify(model, sparsity=0.7, distribution="uniform", dense_first=False, block_size=16)
    formats = {r.name: r.format for r in rigl.summary(model)}
    assert formats == {"fits": "BSR 16x16", "smaller": "BSR 8x8", "none": "dense", "conv": "BSR 16x16"}
    assert model["fits"].topology.n_blocks == 256 - int(0.7 * 256)
    assert model["fits"].values.shape[1:] == (16, 16)


def test_too_few_blocks_get_smaller_with_a_warning() -> None:
    model = nn.Linear(256, 256)
    with pytest.warns(UserWarning, match="only 13 of its 16x16 blocks .* gets blocks of 8x8"):
        layer = rigl.sparsify(model, sparsity=0.95, block_size=16)
    assert layer.block_size == 8
    with pytest.warns(UserWarning, match="gets blocks of 1x1"):
        tiny = rigl.sparsify(nn.Linear(16, 8), sparsity=0.9, block_size=(4, 8))
    assert tiny.block_size == 1


def test_reproducible_and_one_draw_from_the_global_generator() -> None:
    def masks(seed: int, generator: torch.Generator | None = None) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        model = rigl.sparsify(mlp(32, 48, 32, 16), sparsity=0.8, generator=generator)
        return [m.mask() for m in model if isinstance(m, SparseLinear)]

    assert all(map(torch.equal, masks(1), masks(1)))
    assert not all(map(torch.equal, masks(1), masks(2)))
    given = [masks(seed, torch.Generator().manual_seed(5)) for seed in (1, 2)]
    assert all(map(torch.equal, *given))
    following = []
    for sizes in ((32, 32), (64, 64, 64, 64)):
        model = mlp(*sizes)
        torch.manual_seed(3)
        rigl.sparsify(model, sparsity=0.8)
        following.append(torch.rand(()))
    assert torch.equal(*following)


def test_flags_survive() -> None:
    model = mlp(32, 32, 32).eval()
    model[0].weight.requires_grad_(False)
    model.double()
    rigl.sparsify(model, sparsity=0.5)
    assert not model[0].training
    assert not model[0].values.requires_grad
    assert model[2].values.requires_grad
    assert model[0].values.dtype == torch.float64


def test_densify_is_the_inverse() -> None:
    model = rigl.sparsify(ConvNet(), sparsity=0.8).eval()
    x = torch.randn(2, 3, 9, 9)
    before = model(x)
    assert rigl.densify(model) is model
    assert all(row.format == "dense" for row in rigl.summary(model))
    torch.testing.assert_close(model(x), before)


def test_summary_table() -> None:
    model = rigl.sparsify(mlp(100, 100, 10), sparsity=0.9, dense=["2"])
    table = rigl.summary(model)
    assert (table.total, table.nnz) == (11_000, 2_000)
    assert table.sparsity == pytest.approx(9 / 11)
    lines = str(table).splitlines()
    assert lines[0].split() == ["layer", "shape", "format", "density", "nnz"]
    assert lines[2].split() == ["0", "100x100", "CSR", "0.1000", "1,000"]
    assert lines[3].split() == ["2", "10x100", "dense", "1.0000", "1,000"]
    assert len({len(line) for line in lines}) == 1
    assert "2,000" in lines[-1]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"sparsity": 1.0}, ValueError, r"sparsity must be a number in \[0, 1\)"),
        ({"sparsity": -0.5}, ValueError, "sparsity"),
        ({"sparsity": "0.9"}, ValueError, "sparsity"),
        ({"distribution": "best"}, ValueError, "uniform, er, erk, got 'best'"),
        ({"custom": {"fc": 0.5}}, ValueError, "no layer is called 'fc'; the layers are 0, 2"),
        ({"custom": {"0": 1.5}}, ValueError, "custom sparsity of '0'"),
        ({"dense": ["fc"]}, ValueError, "dense names 'fc', but the layers are 0, 2"),
        ({"dense": ["0"], "custom": {"0": 0.5}}, ValueError, "both in dense and in custom"),
        ({"block_size": 0}, ValueError, "block_size"),
        ({"block_size": (2, 2, 2)}, ValueError, "block_size"),
    ],
)
def test_bad_arguments_leave_the_model_alone(kwargs: dict, error: type[Exception], message: str) -> None:
    model = mlp(32, 32, 32)
    with pytest.raises(error, match=message):
        rigl.sparsify(model, **{"sparsity": 0.9, **kwargs})
    assert type(model[0]) is type(model[2]) is nn.Linear


def test_nothing_to_convert() -> None:
    with pytest.raises(ValueError, match="no nn.Linear or nn.Conv2d"):
        rigl.sparsify(nn.ReLU(), sparsity=0.9)
    with pytest.raises(TypeError, match="nn.Module, got dict"):
        rigl.sparsify({}, sparsity=0.9)  # type: ignore[arg-type]
    lazy = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ValueError, match="run a batch through the model"):
        rigl.sparsify(lazy, sparsity=0.9)
