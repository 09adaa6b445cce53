"""RigL's update on the device, forced on CPU tensors: decisions and states are those of the host's."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rigl
import sparse_kernels as sk
from rigl.optimizer_state import state_tensors
from sparse_kernels.nn import SparseLayer
from sparse_kernels.rewiring import Rewiring

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


@pytest.fixture(autouse=True)
def _plain_products() -> Iterator[None]:
    """The CPU kernels do not take an index laid out for a GPU."""
    with sk.use_backend("reference"):
        yield


def mlp(block_size: Any = 1, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        sk.SparseLinear(16, 64, density=0.25, block_size=block_size),
        nn.ReLU(),
        sk.SparseLinear(64, 8, density=0.25, block_size=block_size),
    ).double()


def cnn(block_size: Any = 1, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Unflatten(1, (4, 2, 2)),
        sk.SparseConv2d(4, 8, 3, padding=1, groups=2, density=0.3, block_size=block_size),
        nn.ReLU(),
        nn.Flatten(),
        sk.SparseLinear(32, 8, density=0.3, block_size=block_size),
    ).double()


def layers(model: nn.Module) -> list[SparseLayer]:
    return [m for m in model.modules() if isinstance(m, SparseLayer)]


def force(model: nn.Module, layout: str = "gpu") -> nn.Module:
    for layer in layers(model):
        layer.topology = layer.topology._with_layout(layout)
    return model


def backward(model: nn.Module, seed: int, passes: int = 1) -> None:
    g = torch.Generator().manual_seed(seed)
    for _ in range(passes):
        x, y = torch.randn(16, 16, generator=g).double(), torch.randint(8, (16,), generator=g)
        F.cross_entropy(model(x), y).backward()


class Run:
    """A model in training."""

    def __init__(
        self, model: nn.Module, optimizer: str = "momentum", method: Any = rigl.RigL, **kwargs: Any
    ) -> None:
        self.model, self.optimizer = model, OPTIMIZERS[optimizer](model.parameters())
        settings = {"t_end": 250, "delta_t": 10, "alpha": 0.5, **kwargs}
        self.updater = method(model, self.optimizer, **settings)

    def step(self, seed: int, passes: int = 1) -> bool:
        self.optimizer.zero_grad()
        backward(self.model, seed, passes)
        self.optimizer.step()
        return self.updater.updated

    def dense(self) -> list[Tensor]:
        """All that training changes, whatever the order of values."""
        found = [p.detach().clone() for n, p in self.model.named_parameters() if n.endswith("bias")]
        for layer in layers(self.model):
            to_dense = layer.topology.to_dense
            assert layer.values.grad is not None
            found += [layer.mask(), to_dense(layer.values).detach(), to_dense(layer.values.grad)]
            found += [to_dense(t) for t in state_tensors(self.optimizer, "", layer)]
        return found

    def raw(self) -> list[Tensor]:
        """All that an update may change, as it stands in memory."""
        found = []
        for layer in layers(self.model):
            assert layer.values.grad is not None
            state = state_tensors(self.optimizer, "", layer)
            found += [layer.topology.index, layer.values.detach(), layer.values.grad, *state]
        return [t.clone() for t in found]

    def moved(self) -> int:
        return sum(layer.topology._slots_moved for layer in layers(self.model))


def assert_same(one: Run, other: Run, when: object) -> None:
    for a, b in zip(one.dense(), other.dense(), strict=True):
        assert torch.equal(a, b), f"differs at step {when}"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("block_size", [1, 4, (2, 4)])
def test_300_steps_as_on_the_host(block_size: Any, optimizer: str) -> None:
    host, device = mlp(block_size), force(mlp(block_size))
    runs = [Run(m, optimizer) for m in (host, device)]
    updates = 0
    for step in range(300):
        updated = [run.step(step) for run in runs]
        assert updated[0] == updated[1]
        if updated[0]:
            updates += 1
            assert_same(*runs, step)
            for layer in layers(device):
                layer.topology.validate()
    assert_same(*runs, "end")
    assert runs[0].updater.metrics() == runs[1].updater.metrics()
    assert updates == runs[1].updater.updates == 26
    assert runs[1].moved() == (0 if block_size == 1 else 2)


@pytest.mark.parametrize("block_size", [1, 2])
@pytest.mark.parametrize("passes", [1, 3])
def test_convolutions_and_accumulated_gradients_as_on_the_host(block_size: int, passes: int) -> None:
    runs = [Run(m, "adamw", delta_t=3, block_score="l2") for m in (cnn(block_size), force(cnn(block_size)))]
    for step in range(40):
        assert len({run.step(step, passes) for run in runs}) == 1
        assert_same(*runs, step)
    assert runs[1].updater.updates == 10
    assert runs[1].updater.metrics()["replaced"] > 0


@pytest.mark.parametrize("block_size", [1, 4])
def test_an_update_reads_nothing_on_the_host(block_size: int, no_host_reads: Any) -> None:
    run = Run(force(mlp(block_size)), "adamw", delta_t=2)
    updates = 0
    for seed in range(9):
        run.optimizer.zero_grad()
        backward(run.model, seed)
        with no_host_reads() if run.updater._due() else torch.no_grad():
            run.optimizer.step()
        updates += run.updater.updated
    assert updates == run.updater.updates == 3


def test_a_read_on_the_host_would_be_seen(no_host_reads: Any) -> None:
    run = Run(force(mlp()))
    backward(run.model, 0)
    with pytest.raises(AssertionError, match="waits for the device"), no_host_reads():
        bool(run.model[0].values.grad.isfinite().all())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("block_size", [1, 4])
def test_training_twice_is_bitwise_the_same(block_size: int, optimizer: str) -> None:
    runs = [Run(force(mlp(block_size)), optimizer) for _ in range(2)]
    for step in range(120):
        for run in runs:
            run.step(step)
    assert all(map(torch.equal, runs[0].raw(), runs[1].raw()))
    assert runs[0].updater.updates == 11


@pytest.mark.parametrize("block_size", [1, 4])
def test_resume_is_bit_exact(block_size: int) -> None:
    """Slots stand anywhere by then, and the optimizer's state in their order."""
    whole = Run(force(mlp(block_size)), "adamw", delta_t=4)
    for step in range(40):
        whole.step(step)
    for stop in (3, 17, 26):
        first = Run(force(mlp(block_size)), "adamw", delta_t=4)
        for step in range(stop):
            first.step(step)
        assert first.moved() == (0 if block_size == 1 else 2)
        buffer = io.BytesIO()
        torch.save([part.state_dict() for part in (first.model, first.optimizer, first.updater)], buffer)
        buffer.seek(0)
        second = Run(force(mlp(block_size, seed=1)), "adamw", delta_t=4)
        states = torch.load(buffer, weights_only=True)
        for part, state in zip((second.model, second.optimizer, second.updater), states, strict=True):
            part.load_state_dict(state)
        for step in range(stop, 40):
            second.step(step)
        assert all(map(torch.equal, whole.raw(), second.raw())), f"stopped after {stop}"
        assert whole.updater.metrics() == second.updater.metrics()


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("method", [rigl.RigL, rigl.SET])
def test_a_model_brought_back_to_the_cpu_goes_on(method: Any, block_size: int) -> None:
    """Its values stand in slots: the host's update breaks ties by position all the same."""
    start = Run(force(mlp(block_size)), delta_t=3)
    for step in range(20):
        start.step(step)
    start.updater.remove()
    assert start.moved() == (0 if block_size == 1 else 2)
    with torch.no_grad():
        for layer in layers(start.model):
            layer.values.copy_((layer.values * 8).round() / 8)  # ties
    # In order of the positions, as if it had never left; and in any other.
    plain = copy.deepcopy(start.model)
    for model in (plain, start.model):
        for layer in layers(model):
            dense, topology = layer.dense_weight().detach(), layer.topology
            slot = torch.randperm(topology.n_blocks) if topology.is_bsr and model is not plain else None
            topology.load_arrays_(topology.row_ptr.clone(), topology.col_idx.clone(), slot)
            with torch.no_grad():
                layer.values.copy_(topology.gather(dense))
    runs = [
        Run(m, method=method, delta_t=3, t_end=20) for m in (force(plain, "cpu"), force(start.model, "cpu"))
    ]
    for step in range(12):
        for run in runs:
            run.step(step)
        assert_same(*runs, step)
    assert runs[0].updater.updates >= 3


def test_set_chooses_the_same_wherever_layers_lie() -> None:
    runs = [Run(m, method=rigl.SET, delta_t=2) for m in (mlp(4), force(mlp(4)))]
    for step in range(12):
        for run in runs:
            run.step(step)
        assert_same(*runs, step)
    assert runs[1].updater.updates == 6


def test_all_zero_weights_and_gradients_go_by_position() -> None:
    layer = sk.SparseLinear(8, 8, density=0.25)
    force(layer)
    layer.values.data.zero_()
    before = layer.topology.positions().tolist()
    rigl.RigL(
        layer, opt := torch.optim.SGD(layer.parameters(), lr=0.1), t_end=10, alpha=0.5, schedule="constant"
    )
    layer(torch.zeros(2, 8)).sum().backward()
    opt.step()
    lowest = [p for p in range(64) if p not in before[8:]][:8]
    assert layer.topology.positions().tolist() == sorted(before[8:] + lowest)


# what is not finite ---------------------------------------------------------------------------

ASK: dict[str, Callable[[Run], object]] = {
    "metrics": lambda run: run.updater.metrics(),
    "state": lambda run: run.updater.state_dict(),
    "updates": lambda run: run.updater.updates,
    "failed": lambda run: run.updater.failed_updates,
    "remove": lambda run: run.updater.remove(),
    "next batch": lambda run: [run.step(s) for s in range(4)],
}


@pytest.mark.parametrize("ask", ASK)
@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("where", ["weight", "gradient", "score"])
def test_a_bad_number_stops_all_layers_and_is_told_later(
    where: str, block_size: int, ask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(force(mlp(block_size)), delta_t=3, grad_accumulation=1)
    for seed in range(3):
        run.step(seed)  # an update, two steps
    assert run.updater.updates == 1
    values = layers(run.model)[1].values
    run.step(3)
    run.optimizer.zero_grad()
    if where == "score":
        stripe = sk.growth.dense.linear_stripe  # type: ignore[attr-defined]

        def spoiled(x: Tensor, dy: Tensor, topology: sk.Topology, *rows: int) -> Tensor:
            found = stripe(x, dy, topology, *rows)
            if topology.shape[0] == 8:  # the second layer's; the first position is inactive or not
                found[0, 0] = math.inf
            return found

        monkeypatch.setattr(sk.growth.dense, "linear_stripe", spoiled)  # type: ignore[attr-defined]
    backward(run.model, 3)
    assert values.grad is not None
    with torch.no_grad():
        if where == "weight":
            values.view(-1)[1] = math.nan
        elif where == "gradient":
            values.grad.view(-1)[2] = -math.inf
    before = run.raw()
    run.optimizer.step()
    assert run.updater.updated
    for old, new in zip(before, run.raw(), strict=True):
        assert (
            torch.equal(old.nan_to_num(7.5), new.nan_to_num(7.5))
            if old.is_floating_point()
            else torch.equal(old, new)
        )
    monkeypatch.undo()
    with torch.no_grad():
        values.nan_to_num_(0.1)
    what = {"weight": "a weight", "gradient": "the gradient", "score": r"a growth score \(gradient\)"}[where]
    with pytest.warns(rigl.NonFiniteWarning, match=f"at step 3 skipped: {what} of layer '2' is not finite"):
        ASK[ask](run)
    assert run.updater.failed_updates == 1
    assert run.updater.updates == (2 if ask == "next batch" else 1)


def test_a_host_layer_and_a_device_layer_go_together() -> None:
    for bad in (None, 0, 1):
        model = mlp(4)
        layers(model)[1].topology = layers(model)[1].topology._with_layout("gpu")
        run, other = Run(model), Run(mlp(4))
        for r in (run, other):
            backward(r.model, 0)
        if bad is None:
            for r in (run, other):
                r.optimizer.step()
            assert_same(run, other, 0)
            assert run.updater.metrics() == other.updater.metrics()
            continue
        layers(model)[bad].values.data[0, 0, 0] = math.nan
        before = run.raw()
        with pytest.warns(rigl.NonFiniteWarning, match="a weight of layer"):
            run.optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before[::3], run.raw()[::3], strict=True))
        assert (run.updater.updates, run.updater.failed_updates) == (0, 1)


def test_what_breaks_into_an_update_finds_it_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values without their index would be lost: an update is not left in the middle."""
    whole = Run(force(mlp(4)))
    whole.step(0)
    apply = Rewiring.apply_
    for stop in range(2):
        run, calls = Run(force(mlp(4))), []

        def interrupted(self: Rewiring, stop: int = stop, calls: list[int] = calls) -> None:
            calls.append(1)
            if len(calls) == stop + 1:
                self.topology.index.copy_(self.index)
                raise KeyboardInterrupt
            apply(self)

        monkeypatch.setattr(Rewiring, "apply_", interrupted)
        run.optimizer.zero_grad()
        backward(run.model, 0)
        with pytest.raises(KeyboardInterrupt):
            run.optimizer.step()
        monkeypatch.undo()
        assert all(map(torch.equal, whole.raw(), run.raw()))
        assert run.updater.metrics() == whole.updater.metrics()
