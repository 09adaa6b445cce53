"""Models in training, eager and graphed, for the tests of GraphedStep without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from recorded_graph import RecordedGraphs
from torch import Tensor, nn
from torch.nn import functional as F

import rigl
import sparse_kernels as sk
from rigl.optimizer_state import state_tensors
from sparse_kernels.nn import SparseLayer

SGD = torch.optim.SGD
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "momentum": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "dampened": lambda p: SGD(p, lr=0.05, momentum=0.9, dampening=0.5),
    "capturable": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, capturable=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}
INSIDE = ("momentum", "dampened", "capturable")  # whose step is part of the graph


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU kernels do not take an index laid out for a GPU."""
    monkeypatch.setattr(rigl.GraphedStep, "_graphs", RecordedGraphs)
    adam = sys.modules["torch.optim.adam"]
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda *_: ["cpu"])
    RecordedGraphs.log.clear()
    with sk.use_backend("reference"):
        yield


def mlp(block_size: Any = 4, *between: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return as_on_a_gpu(
        nn.Sequential(
            sk.SparseLinear(16, 64, density=0.25, block_size=block_size),
            nn.ReLU(),
            *between,
            sk.SparseLinear(64, 8, density=0.25, block_size=block_size),
        )
    )


def cnn(block_size: Any = 2) -> nn.Module:
    torch.manual_seed(0)
    return as_on_a_gpu(
        nn.Sequential(
            nn.Unflatten(1, (4, 2, 2)),
            sk.SparseConv2d(4, 8, 3, padding=1, groups=2, density=0.3, block_size=block_size),
            nn.ReLU(),
            nn.Flatten(),
            sk.SparseLinear(32, 8, density=0.3, block_size=block_size),
        )
    )


def as_on_a_gpu(model: nn.Module) -> nn.Module:
    for layer in layers(model):
        layer.topology = layer.topology._with_layout("gpu")
    return model


def layers(model: nn.Module) -> list[SparseLayer]:
    return [m for m in model.modules() if isinstance(m, SparseLayer)]


def batch(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(16, 16, generator=g), torch.randint(8, (16,), generator=g)


class Run:
    """A model in training; eager unless `graphed`."""

    def __init__(
        self, model: nn.Module, optimizer: Any = "momentum", method: Any = rigl.RigL, **kwargs: Any
    ) -> None:
        make = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
        self.model, self.optimizer = model, make(model.parameters())
        settings = {"t_end": 250, "delta_t": 5, "alpha": 0.5, **kwargs}
        self.method = method(model, self.optimizer, **settings)
        self.graphed: rigl.GraphedStep | None = None

    def with_graphs(self) -> Run:
        self.graphed = rigl.GraphedStep(self.model, F.cross_entropy, self.optimizer, self.method)
        return self

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        if self.graphed is not None:
            return self.graphed(x, y)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def raw(self) -> list[Tensor]:
        """All that training changes, as it stands in memory."""
        found = [t.detach().clone() for t in self.model.state_dict().values() if isinstance(t, Tensor)]
        found += [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        for layer in layers(self.model):
            found += [
                layer.topology.index.clone(),
                *map(torch.clone, state_tensors(self.optimizer, "", layer)),
            ]
        return found


def pair(make: Callable[[], nn.Module] = mlp, *args: Any, **kwargs: Any) -> tuple[Run, Run]:
    return Run(make(), *args, **kwargs), Run(make(), *args, **kwargs).with_graphs()


def same(runs: tuple[Run, Run], when: object) -> None:
    ours, theirs = (run.raw() for run in runs)
    assert len(ours) == len(theirs)
    assert all(map(_equal, ours, theirs)), f"differs at step {when}"
    counts = [(r.method.step_count, r.method.updated, r.method._last_update) for r in runs]
    assert counts[0] == counts[1], f"counted otherwise at step {when}"


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5)) if a.is_floating_point() else torch.equal(a, b)


def train(
    runs: tuple[Run, Run], steps: range = range(60), between: Callable[[Run, int], Any] | None = None
) -> None:
    """Both; all is the same after every step, and the losses still are in the end."""
    losses: list[list[Tensor]] = [[], []]
    for step in steps:
        x, y = batch(step)
        for run, found in zip(runs, losses, strict=True):
            torch.manual_seed(step)
            if between is not None:
                between(run, step)
            found.append(run.step(x.clone(), y))
        same(runs, step)
    assert torch.equal(*map(torch.stack, losses))
    assert runs[0].method.state_dict() == runs[1].method.state_dict()
    assert runs[0].method.metrics() == runs[1].method.metrics()


def counted(what: str) -> int:
    return RecordedGraphs.log.count(what)
