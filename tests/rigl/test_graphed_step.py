"""GraphedStep against the eager loop, bit for bit, with a stand-in for CUDA graphs (recorded_graph.py)."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_cases import (
    INSIDE,
    OPTIMIZERS,
    SGD,
    Run,
    as_on_a_gpu,
    batch,
    cnn,
    counted,
    layers,
    mlp,
    pair,
    same,
    stand_in,  # noqa: F401  (a fixture)
    train,
)
from recorded_graph import RecordedGraphs
from torch import Tensor, nn
from torch.nn import functional as F

import rigl
import sparse_kernels as sk
from rigl.outcomes import NotReady

pytestmark = pytest.mark.usefixtures("stand_in")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("block_size", [1, (2, 4)])
def test_60_steps_as_the_eager_loop(block_size: Any, optimizer: str) -> None:
    runs = pair(lambda: mlp(block_size), optimizer)
    train(runs)
    assert runs[1].method.updates == 10
    assert (counted("eager"), counted("capture"), counted("replay")) == (4, 2, 56)
    step = runs[1].graphed
    assert step._plain.steps == (optimizer in INSIDE)
    assert all(a is b for a, b in zip(step._plain.grads, step._scored.grads, strict=True))


@pytest.mark.parametrize("method", [rigl.RigL, rigl.SET, rigl.Static])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_other_models_and_methods(method: Any, optimizer: str) -> None:
    runs = pair(cnn, optimizer, method, delta_t=2, block_score="l2")
    train(runs, range(20))
    assert runs[1].method.updates == {rigl.RigL: 7, rigl.SET: 10, rigl.Static: 0}[method]
    assert counted("capture") == (2 if method is rigl.RigL else 1)


def test_random_numbers_and_a_layer_used_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = sk.SparseLinear(16, 16, density=0.3), sk.SparseLinear(16, 8, density=0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.dropout(self.inner(self.inner(x).relu()), 0.2))

    def make() -> nn.Module:
        torch.manual_seed(0)
        return as_on_a_gpu(Twice())

    runs = pair(make, delta_t=3)
    train(runs, range(30))
    assert counted("replay") == 25  # the second topology batch comes before there is any graph


# what changes in the course of a training -------------------------------------------------------


def test_candidates_for_more_weights_are_captured_anew() -> None:
    """Single weights: the graph finds as many candidates as it was captured for."""
    runs = pair(lambda: mlp(1), schedule=lambda step: min(0.9, 0.01 * step))
    train(runs)
    assert counted("capture") > 6
    blocks = pair(schedule=lambda step: min(0.9, 0.01 * step))
    RecordedGraphs.log.clear()
    train(blocks)
    assert counted("capture") == 4  # one more layer to update is another graph; more blocks are not


def scheduled(run: Run) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 1 / (1 + max(0, step - 12)))


@pytest.mark.parametrize("optimizer", ["momentum", "capturable", "adamw"])
def test_a_learning_rate_that_changes(optimizer: str) -> None:
    runs = pair(mlp, optimizer)
    schedulers = {id(run): scheduled(run) for run in runs}
    train(runs, between=lambda run, step: step and schedulers[id(run)].step())
    assert not runs[1].graphed._plain.steps
    assert counted("capture") == (4 if optimizer in INSIDE else 2)


def test_a_learning_rate_in_a_tensor_stays_in_the_graph() -> None:
    runs = pair(mlp, lambda p: torch.optim.Adam(p, lr=torch.tensor(0.05), capturable=True))
    schedulers = {id(run): scheduled(run) for run in runs}
    train(runs, between=lambda run, step: step and schedulers[id(run)].step())
    assert runs[1].graphed._plain.steps
    assert counted("capture") == 2
    for run in runs:
        run.optimizer.param_groups[0]["lr"] = torch.tensor(0.5)  # another one
    train(runs, range(60, 80))
    assert not runs[1].graphed._plain.steps


def test_sgd_reads_a_tensor_on_the_host() -> None:
    runs = pair(mlp, lambda p: SGD(p, lr=torch.tensor(0.05)))
    train(runs, range(20), lambda run, step: run.optimizer.param_groups[0]["lr"].fill_(0.1 / (step + 1)))
    assert not runs[1].graphed._plain.steps


def frozen(run: Run, step: int) -> None:
    layers(run.model)[0].values.requires_grad_(not 15 <= step < 30)


def evaluated(run: Run, step: int) -> None:
    run.model.train(step % 20 < 13)


def reloaded(run: Run, step: int) -> None:
    if step in (17, 18):
        run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))


def elsewhere(run: Run, step: int) -> None:
    if step == 23:
        layers(run.model)[0].values.data = layers(run.model)[0].values.data.clone()
    if step == 33:
        layers(run.model)[1].topology = layers(run.model)[1].topology.clone()


def cleared(run: Run, step: int) -> None:
    run.optimizer.zero_grad(set_to_none=step % 2 == 0)


def clipped(run: Run, step: int) -> None:
    if step == 12:
        parameters = list(run.model.parameters())

        def clip(*_: Any) -> None:
            nn.utils.clip_grad_norm_(parameters, 0.1)

        run.optimizer.register_step_pre_hook(clip)


def hooked(run: Run, step: int) -> None:
    if step == 0:
        calls: list[int] = []

        def shrink(*_: Any) -> None:
            calls.append(1)
            for parameter in run.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(len(calls))

        run.optimizer.register_step_pre_hook(shrink)


def updated_by_hand(run: Run, step: int) -> None:
    if step == 22:
        for layer in layers(run.model):
            active = set(layer.topology.positions().tolist())
            spare = [p for p in range(layer.topology.rows * layer.topology.cols) if p not in active][:2]
            layer.update_topology(torch.tensor([0, 3]), torch.tensor(spare))


EVENTS = [frozen, evaluated, reloaded, elsewhere, cleared, clipped, hooked, updated_by_hand]


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("optimizer", ["dampened", "capturable"])
def test_what_happens_in_a_training(event: Callable[[Run, int], None], optimizer: str) -> None:
    runs = pair(lambda: mlp(4, nn.Dropout(0.1)), optimizer)
    train(runs, range(45), event)
    assert runs[1].method.updates == 8
    assert counted("replay") > 20


def test_autocast_in_and_out() -> None:
    runs = pair()
    for begin, on in ((0, True), (15, False), (30, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            train(runs, range(begin, begin + 15))
    assert counted("capture") >= 5


def test_a_run_goes_on_from_a_checkpoint() -> None:
    runs = pair()
    train(runs, range(33))
    other = Run(mlp())
    for name in ("model", "optimizer", "method"):
        getattr(other, name).load_state_dict(getattr(runs[1], name).state_dict())
    train((runs[0], other.with_graphs()), range(33, 60))


def test_a_postponed_update_is_an_ordinary_step(monkeypatch: pytest.MonkeyPatch) -> None:
    ready, late = rigl.RigL._check_ready, {7, 8, 19}

    def check(self: rigl.RigL, tracker: Any) -> bool:
        if self.step_count in late:
            raise NotReady("not now")
        return ready(self, tracker)

    monkeypatch.setattr(rigl.RigL, "_check_ready", check)
    runs = pair(begin=2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train(runs)
    steps = [int(re.findall(r"postponed by a step at step (\d+): not now", str(w.message))[0]) for w in told]
    assert steps == [7, 7, 8, 8, 19, 19]
    assert runs[1].method.updates == 10


@pytest.mark.parametrize("where", ["x", "weight"])
def test_a_bad_number_stops_the_update_and_is_told_later(where: str) -> None:
    runs = pair()
    train(runs, range(30))
    assert runs[1].method._due()
    x, y = batch(30)
    before = runs[1].model[0].topology.index.clone()
    for run in runs:
        with torch.no_grad():
            if where == "x":
                x[0, 0] = torch.inf
            else:
                run.model[0].values[0, 0, 0] = torch.nan
        run.step(x, y)
    same(runs, 30)
    assert torch.equal(before, runs[1].model[0].topology.index)
    for run in runs:
        with pytest.warns(rigl.NonFiniteWarning, match="at step 25 skipped"):
            assert run.method.failed_updates == 1
