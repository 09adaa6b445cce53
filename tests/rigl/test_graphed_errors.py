"""What GraphedStep refuses, the stand-in that it is tested with, and the example in the documents."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_cases import (
    SGD,
    Run,
    as_on_a_gpu,
    batch,
    counted,
    mlp,
    pair,
    stand_in,  # noqa: F401  (a fixture)
    train,
)
from recorded_graph import RecordedGraphs
from torch import Tensor, nn
from torch.nn import functional as F

import rigl

pytestmark = pytest.mark.usefixtures("stand_in")


def build(**changes: Any) -> rigl.GraphedStep:
    run = Run(mlp(), **changes.pop("run", {}))
    given = {"model": run.model, "loss_fn": F.cross_entropy, "optimizer": run.optimizer, "method": run.method}
    return rigl.GraphedStep(**{**given, **changes})


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "model": ({"model": 3}, TypeError, "model must be an nn.Module, got int"),
    "loss": ({"loss_fn": None}, TypeError, "loss_fn must be callable"),
    "scaler": ({"optimizer": torch.amp.GradScaler("cpu")}, TypeError, "GradScaler.*use bfloat16"),
    "optimizer": ({"optimizer": "sgd"}, TypeError, "must be a torch.optim.Optimizer, got str"),
    "method": ({"method": None}, TypeError, "must be a rigl.RigL.*got NoneType"),
    "another": ({"optimizer": SGD([torch.ones(1)], lr=0.1)}, ValueError, "not attached to this optimizer"),
    "accumulation": ({"run": {"grad_accumulation": 4}}, ValueError, "accumulates gradients over 4"),
}


@pytest.mark.parametrize("case", BAD)
def test_arguments_that_cannot_be(case: str) -> None:
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        build(**dict(changes))


def test_accumulation_seen_before() -> None:
    run = Run(mlp())
    for seed in (0, 1):
        F.cross_entropy(run.model(batch(seed)[0]), batch(seed)[1]).backward()
    run.optimizer.step()
    with pytest.raises(ValueError, match="accumulates gradients over 2: use a larger batch"):
        run.with_graphs()


def test_a_method_removed() -> None:
    run = Run(mlp())
    run.method.remove()
    with pytest.raises(ValueError, match="not attached"):
        run.with_graphs()


def test_a_model_that_is_not_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r'must be on one GPU.*on cpu: use model.to\("cuda"\)'):
        build()


def test_batches_that_do_not_fit() -> None:
    step, (x, y) = build(), batch(0)
    step(x, y)
    with pytest.raises(
        ValueError, match=r"float32\[16, 16\] and int64\[16\], got float32\[7, 16\].*drop_last"
    ):
        step(x[:7], y[:7])
    with pytest.raises(ValueError, match=r"got float64\[16, 16\]"):
        step(x.double(), y)
    with pytest.raises(ValueError, match=r"got float32\[16, 16\]: a graph"):
        step(x)
    with pytest.raises(TypeError, match="must be made of tensors, got list"):
        step(x, [1])


@pytest.mark.parametrize("scored", [False, True])
def test_a_step_that_waits_for_the_gpu_is_told_and_can_be_mended(scored: bool) -> None:
    """Half of the backward pass has been seen by then."""
    runs, waits = pair(), []

    def look(bias: Tensor) -> None:
        if waits and bias.grad is not None:
            bias.grad.sum().item()

    runs[1].model[0].bias.register_post_accumulate_grad_hook(look)
    begin = 6 if scored else 4
    train(runs, range(begin))
    assert runs[1].method._due() == scored
    waits.append(1)
    with pytest.raises(RuntimeError, match="could not be captured.*must not wait for the GPU"):
        runs[1].step(*batch(begin))
    waits.clear()
    train(runs, range(begin, 30))
    assert counted("replay") > 20


# the stand-in, and what is shown in the documents --------------------------------------------------


def test_the_stand_in_runs_no_python_when_it_replays() -> None:
    layer, calls, x = nn.Linear(4, 4), [], torch.randn(2, 4)
    layer.weight.register_post_accumulate_grad_hook(lambda _: calls.append(1))
    weight, out = layer.weight.detach().clone(), []

    def call() -> None:
        layer(x).square().sum().backward()
        layer.weight.data.add_(layer.weight.grad, alpha=-0.1)
        out.append(layer.weight.grad)

    replay = RecordedGraphs(torch.device("cpu")).capture(call)
    assert torch.equal(weight, layer.weight), "the capture computed something"
    assert out[0].isnan().all()
    for _ in range(2):
        x.normal_()
        wanted = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
        with torch.no_grad():
            weight.copy_(layer.weight).add_(wanted, alpha=-0.1)
        replay()
        assert torch.equal(out[0], wanted)
        assert torch.equal(weight, layer.weight)
    assert calls == [1]


def test_the_stand_in_refuses_reads_on_the_host() -> None:
    for call in (lambda: torch.ones(3).sum().item(), lambda: torch.ones(3)[torch.ones(3) > 0]):
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            RecordedGraphs(torch.device("cpu")).capture(call)  # type: ignore[arg-type]


def test_the_example_of_the_documents() -> None:
    """On the CPU, so that it is not only run where there is a GPU."""
    page = Path(__file__).parents[2] / "docs" / "gpu.md"
    (code,) = re.findall(r"^```python gpu\n(.*?)^```", page.read_text(), flags=re.S | re.M)
    code = code.replace('"cuda"', '"cpu"').replace("rigl.sparsify(", "as_on_a_gpu(rigl.sparsify)(")

    def on_a_gpu(function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        return lambda *args, **kwargs: as_on_a_gpu(function(*args, **kwargs))

    scope: dict[str, Any] = {"as_on_a_gpu": on_a_gpu}
    with contextlib.redirect_stdout(None):
        exec(compile(code, "gpu.md", "exec"), scope)
    assert counted("capture") == 2
    assert counted("replay") > 50
    assert scope["method"].updates > 2
