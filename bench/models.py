"""Whole training steps of three networks, dense against RigL: what a user gains, everything included.

Networks are made sparse as a user would, by `rigl.sparsify`, trained by SGD with momentum on random data:

- `mlp`: 784-2048-2048-10, batch 256. All layers take part, ERK (the default of `sparsify`).
- `resnet18`: with the stem for small images (3x3, no pooling), batch 32 of 3x32x32. Uniform density; first
  convolution and last layer dense, as is customary.
- `wrn-22-2`: batch 128 of 3x32x32, likewise.

A step is forward, loss, backward and optimizer. RigL spends one batch more every 100 steps; its cost, and
what the step after it takes longer, is spread over those.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rigl
from sparse_kernels import _ops
from sparse_kernels.nn import SparseConv2d, SparseLinear
from sparse_kernels.testing import assert_normwise

from .measure import Row, Start, WrongResult, fastest, format_name
from .rivals import rivals_of
from .timing import Contestant, Race

DELTA_T = 100  # steps between updates, over which the figures spread their cost
EVERY = 4  # steps between updates while we measure


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut; `before`: norm and ReLU stand before them (wide ResNets)."""

    def __init__(self, inputs: int, outputs: int, stride: int, before: bool) -> None:
        super().__init__()
        self.before = before
        self.norm1 = nn.BatchNorm2d(inputs if before else outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = None
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut_norm = nn.Identity() if before else nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """A residual block."""
        if self.before:
            x_in = F.relu(self.norm1(x))
            y = self.conv2(F.relu(self.norm2(self.conv1(x_in))))
            return y + (x if self.shortcut is None else self.shortcut(x_in))
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + (x if self.shortcut is None else self.shortcut_norm(self.shortcut(x))))


class ResNet(nn.Module):
    """A ResNet for 32x32 images: `widths` of the stages, `depth` blocks in each."""

    def __init__(self, stem: int, widths: tuple[int, ...], depth: int, before: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(widths[-1] if before else stem)
        self.before = before
        blocks, inputs = [], stem
        for at, width in enumerate(widths):
            for i in range(depth):
                blocks.append(Block(inputs, width, 2 if i == 0 and at > 0 else 1, before))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.stem(x)
        x = self.blocks(x if self.before else F.relu(self.norm(x)))
        x = F.relu(self.norm(x)) if self.before else x
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def _mlp(hidden: int = 2048) -> nn.Module:
    sizes = (784, hidden, hidden)
    hidden_layers = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden_layers, nn.Linear(hidden, 10))


@dataclass(frozen=True)
class Model:
    """One network and how it is made sparse."""

    name: str
    dense: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    distribution: str = "uniform"
    keep_dense: tuple[str, ...] = ("head",)

    def sparse(self, density: float, block_size: int = 1) -> nn.Module:
        """As a user would."""
        return rigl.sparsify(
            self.dense(),
            sparsity=1 - density,
            distribution=self.distribution,
            dense=self.keep_dense,
            block_size=block_size,
        )


MODELS = {
    model.name: model
    for model in (
        Model("mlp", _mlp, (256, 784), "erk", ()),
        Model("resnet18", lambda: ResNet(64, (64, 128, 256, 512), 2, False), (32, 3, 32, 32)),
        Model("wrn-22-2", lambda: ResNet(16, (32, 64, 128), 3, True), (128, 3, 32, 32)),
        Model("mlp-tiny", lambda: _mlp(64), (8, 784), "erk", ()),
        Model("resnet-tiny", lambda: ResNet(16, (16, 32), 1, False), (2, 3, 8, 8)),
    )
}


@dataclass
class Training:
    """A network in training, and what each of its steps was: ordinary, a topology batch, the one after."""

    model: nn.Module
    x: Tensor
    labels: Tensor
    rigl: bool = False
    kinds: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.updater = None
        if self.rigl:
            self.updater = rigl.RigL(
                self.model, self.optimizer, t_end=10**9, delta_t=EVERY, begin=EVERY, schedule="constant"
            )

    def step(self) -> None:
        """Forward, loss, backward, optimizer, topology update."""
        loss = F.cross_entropy(self.model(self.x), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.updater is not None and self.updater.updated:
            self.kinds.append("topology")
        else:
            self.kinds.append("after" if self.kinds and self.kinds[-1] == "topology" else "step")


def check(model: nn.Module, x: Tensor, labels: Tensor) -> None:
    """Raise if the sparse network and its dense twin differ in the loss or in any gradient.

    The twin holds zeros where ours holds nothing. In float64 on some samples the bound is tight. In float32
    on all of them it cannot be: one ReLU in a million that falls to the other side of zero moves gradients
    below it (in WRN-22-2 at 98 %, against float64: ours by up to 0.6 %, dense torch's by up to 0.4 %). Tight
    bounds in float32 are those of single layers (measure.py).
    """
    _check(model, x[:16].double(), labels[:16], 1e-9)
    _check(model, x, labels, 2e-2)


def _check(model: nn.Module, x: Tensor, labels: Tensor, rtol: float) -> None:
    ours = copy.deepcopy(model).to(x.dtype)
    twin = rigl.densify(copy.deepcopy(ours))
    losses = []
    for one in (ours, twin):
        loss = F.cross_entropy(one(x), labels)
        loss.backward()
        losses.append(loss.detach())
    dense = dict(twin.named_modules())
    try:
        assert_normwise(losses[0][None], losses[1][None], rtol=min(rtol, 1e-4), name="loss")
        for name, layer in ours.named_modules():
            if isinstance(layer, (SparseLinear, SparseConv2d)):
                expected = layer.topology.gather(dense[name].weight.grad)  # type: ignore[union-attr, arg-type]
                assert_normwise(layer.values.grad, expected, rtol=rtol, name=f"dW of {name}, {x.dtype}")
    except AssertionError as error:
        raise WrongResult(str(error)) from None


def rival_models(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, nn.Module]:
    """The same network with others' layers in place of ours, by name: those that can hold all of them."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (SparseLinear, SparseConv2d))}
    made = {name: rivals_of(layer) for name, layer in layers.items()}
    found = {}
    with torch.no_grad():
        expected = F.cross_entropy(copy.deepcopy(model)(x), labels).item()
    for rival in dict.fromkeys(r for rivals in made.values() for r in rivals):
        if not all(rival in rivals for rivals in made.values()):
            continue
        other = copy.deepcopy(model)
        for name, rivals in made.items():
            other.set_submodule(name, rivals[rival])
        with torch.no_grad():
            loss = F.cross_entropy(other(x), labels).item()
        if abs(loss - expected) <= 1e-3 * abs(expected):
            found[rival] = other
        else:
            print(f"{rival} is wrong: loss {loss:.6g}, expected {expected:.6g}", file=sys.stderr)
    return found


def measure_model(
    model: Model,
    density: float,
    block_size: int = 1,
    *,
    budget: float = 4.0,
    peers: bool = True,
    start: Start = lambda race, ours: race.run(),
) -> Row:
    """Check a network, then race its whole steps against the dense network's."""
    torch.manual_seed(0)
    x = torch.randn(model.input_shape)
    labels = torch.randint(10, (len(x),))
    sparse = model.sparse(density, block_size)
    check(sparse, x, labels)

    rivals = {"dense": Training(model.dense(), x, labels)}
    if x.dim() == 4:
        last = torch.channels_last
        rivals = {
            "dense NCHW": rivals["dense"],
            "dense channels_last": Training(
                model.dense().to(memory_format=last), x.to(memory_format=last), labels
            ),
        }
    # Others keep the mask they have: none of them could follow RigL at this price.
    others = rival_models(sparse, x, labels) if peers else {}
    trainings = rivals | {name: Training(m, x, labels) for name, m in others.items()}
    ours = Training(sparse, x, labels, rigl=True)
    contestants = {name: Contestant([training.step]) for name, training in trainings.items()}
    # A turn of ours holds one topology batch, the step after it, and EVERY - 1 others.
    contestants["ours"] = Contestant([ours.step], calls=EVERY + 1)
    race = Race(contestants, budget)
    warm = len(ours.kinds)
    start(race, "ours")
    kinds, crowd = ours.kinds[warm:], race.crowd(torch.get_num_threads())

    seconds: dict[str, list[float]] = {"step": [], "topology": [], "after": []}
    for kind, took in zip(kinds, race.seconds("ours"), strict=True):
        seconds[kind].append(took)
    # Ratios are those of ordinary steps; what updates add is in their numbers.
    samples = zip(kinds, contestants["ours"].samples, strict=True)
    contestants["ours"].samples = [sample for kind, sample in samples if kind == "step"]
    contestants["ours"].calls = EVERY - 1
    plain, topology = statistics.median(seconds["step"]), statistics.median(seconds["topology"])
    after = max(0.0, statistics.median(seconds["after"]) - plain)
    spread_out = (topology + after) / DELTA_T
    best = race.best(list(rivals))
    ratio = race.ratio(best, "ours")
    return Row(
        "step", model.name, format_name(block_size), density, "step", (plain + spread_out) * 1e3,
        best, race.times(best).median * 1e3, ratio.median * plain / (plain + spread_out), ratio.spread,
        torch.get_num_threads(), _ops.cpu_isa(), model.name,
        rivals=fastest(race, [*rivals, "ours"]), crowd=crowd,
        extra={"plain ms": plain * 1e3, "topology ms": topology * 1e3, "after ms": (plain + after) * 1e3},
    )  # fmt: skip
