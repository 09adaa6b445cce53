"""Checkpoints: a run that stops and resumes equals the one that did not, bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_loops import OPTIMIZERS, backward, everything, tiny

import rigl


def start(method: Callable[..., Any], name: str, seed: int = 0, **kwargs: Any) -> tuple[Any, Any, Any]:
    model = tiny(seed=seed)
    optimizer = OPTIMIZERS[name][0](model.parameters())
    updater = method(model, optimizer, **{"t_end": 12, "delta_t": 3, "seed": seed, **kwargs})
    return model, optimizer, updater


def run(model: Any, optimizer: Any, batches: range) -> None:
    for seed in batches:
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()


@pytest.mark.parametrize("name", ["momentum", "adamw"])
@pytest.mark.parametrize("method", [rigl.RigL, rigl.SET, rigl.Static])
def test_resume_is_bit_exact_at_every_step(method: Callable[..., Any], name: str) -> None:
    model, optimizer, updater = start(method, name)
    run(model, optimizer, range(16))
    final, figures = everything(model, optimizer), updater.metrics()
    for stop in range(16):
        first = start(method, name)
        run(*first[:2], range(stop))
        buffer = io.BytesIO()
        torch.save([part.state_dict() for part in first], buffer)
        buffer.seek(0)
        states = torch.load(buffer, weights_only=True)
        second = start(method, name, seed=1)  # other weights, topology and seed: all come from the checkpoint
        for part, state in zip(second, states, strict=True):
            part.load_state_dict(state)
        run(*second[:2], range(stop, 16))
        assert all(map(torch.equal, final, everything(*second[:2]))), f"stopped after {stop}"
        assert second[2].metrics() == figures


def test_bad_states_change_nothing() -> None:
    model, optimizer, updater = start(rigl.RigL, "momentum")
    run(model, optimizer, range(3))
    good = updater.state_dict()
    for bad, message in (
        ({}, "expected the state of a RigL"),
        ([], "expected the state of a RigL"),
        ({**good, "method": "SET"}, "the state of a SET, not of a RigL"),
        ({**good, "step_count": "3"}, "step_count must be an int, got '3'"),
        ({**good, "step_count": -5}, "step_count must not be negative, got -5"),
        ({**good, "last_update": 10**9}, "last_update must not be after step_count"),
        ({**good, "passes": None}, "not in both: None"),
        (
            {**good, "passes": {"0": "x", "2": 1}},
            "passes of layer '0' must be a positive int or None, got 'x'",
        ),
        ({**good, "passes": {"other": 1}}, "other sparse layers; not in both: 0, 2, other"),
    ):
        with pytest.raises(ValueError, match=message):
            updater.load_state_dict(bad)  # type: ignore[arg-type]
        assert updater.state_dict() == good


def test_models_with_an_updater_copy_and_pickle() -> None:
    model, optimizer, updater = start(rigl.RigL, "momentum")
    assert model[0].growth is not None
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin[0].growth is None
        before = twin[0].mask()
        twin(torch.randn(2, 16)).sum().backward()
        assert torch.equal(twin[0].mask(), before)
    copy.deepcopy(optimizer)
    run(model, optimizer, range(2))
    assert updater.updates == 1
