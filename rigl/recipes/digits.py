"""The first thing to run: handwritten digits, a dense and a sparse network side by side."""

from __future__ import annotations

import copy
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import rigl
from sparse_kernels.nn import SparseLinear

from ._duel import Contestant, count_weights, training_flops

ABOUT = "a 64-2048-2048-10 network on scikit-learn's handwritten digits, dense and sparse side by side"

_METHODS = {"rigl": "RigL", "set": "SET", "static": "Static"}
_SIZES = (64, 2048, 2048, 10)
_TEST_IMAGES = 450


@dataclass(frozen=True)
class Digits:
    """Train a dense and a sparse 64-2048-2048-10 network on handwritten digits, side by side."""

    sparsity: float = 0.95
    """Fraction of all weights that is not there."""
    method: Literal["rigl", "set", "static"] = "rigl"
    """How the topology changes: rigl grows by gradient, set at random, static keeps the first one."""
    block_size: int = 1
    """1 stores single weights, b stores b x b blocks."""
    distribution: Literal["erk", "er", "uniform"] = "erk"
    """How the sparsity is spread over the layers."""
    epochs: int = 40
    """Passes over the 1347 training images."""
    seed: int = 0
    """Of the initial weights, the first topology and the order of the images; the test set stays the same."""
    batch_size: int = 128
    """Images per step."""
    lr: float = 0.05
    """Initial learning rate (SGD, momentum 0.9, cosine decay to 0)."""
    weight_decay: float = 5e-4
    """L2 penalty, on stored weights."""
    delta_t: int = 20
    """Optimizer steps between topology updates."""
    alpha: float = 0.3
    """Fraction of a layer's weights replaced by the first update (cosine decay to 0 at 75 % of training)."""
    threads: int = 1
    """CPU threads, 0 for all cores. One by default: the ratio then does not depend on how many there are."""
    out: Path = Path("runs/digits")
    """Folder for report.json and report.png."""


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, training labels, test images, test labels: a fixed stratified split, standardised.

    Returns:
        `[1347, 64]` float32, `[1347]` int64, `[450, 64]`, `[450]`.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=_TEST_IMAGES, stratify=labels, random_state=0)
    x, x_test, y, y_test = map(torch.as_tensor, parts)
    mean, std = x.mean(0), x.std(0)
    std[std == 0] = 1  # border pixels that are never inked
    x, x_test = (((t - mean) / std).float() for t in (x, x_test))
    return x, y, x_test, y_test


def build(config: Digits) -> tuple[nn.Module, nn.Module]:
    """The dense network, and a copy of it made sparse: the same initial values where both have weights."""
    torch.manual_seed(config.seed)
    layers: list[nn.Module] = []
    for inner, outer in zip(_SIZES, _SIZES[1:], strict=False):
        layers += [nn.Linear(inner, outer), nn.ReLU(inplace=True)]
    dense = nn.Sequential(*layers[:-1])
    sparse = rigl.sparsify(
        copy.deepcopy(dense),
        sparsity=config.sparsity,
        distribution=config.distribution,
        block_size=config.block_size,
        generator=torch.Generator().manual_seed(config.seed),
    )
    return dense, sparse


def summary(config: Digits) -> object:
    """The sparse network's layers, printable."""
    _check(config)
    return rigl.summary(build(config)[1])


def _contestant(model: nn.Module, config: Digits, steps: int) -> Contestant:
    optimizer = torch.optim.SGD(model.parameters(), config.lr, momentum=0.9, weight_decay=config.weight_decay)
    return Contestant(model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps))


def _connections(model: nn.Module) -> Tensor | None:
    """`[8, 8]`: how many weights of the first layer look at each pixel; None if that layer is dense."""
    first = next(m for m in model.modules() if isinstance(m, (SparseLinear, nn.Linear)))
    return first.mask().sum(0).reshape(8, 8) if isinstance(first, SparseLinear) else None


def _check(config: Digits) -> None:
    """Raise ValueError for a setting that would fail later, or train for nothing."""
    for name, fits, expected in (
        ("sparsity", 0 < config.sparsity < 1, "between 0 and 1 (the fraction of weights that is not there)"),
        ("epochs", config.epochs >= 1, "at least 1"),
        ("batch_size", 1 <= config.batch_size <= 1347, "between 1 and 1347 (the training images)"),
        ("threads", config.threads >= 0, "0 (all cores) or more"),
        ("seed", 0 <= config.seed < 2**63, "between 0 and 2^63 - 1"),
        ("lr", 0 < config.lr < float("inf"), "a positive number"),
        ("weight_decay", 0 <= config.weight_decay < float("inf"), "a number >= 0"),
    ):
        if not fits:
            raise ValueError(f"{name} must be {expected}, got {getattr(config, name)}")
    if config.method == "rigl" and config.epochs * (1347 // config.batch_size) < 2:
        raise ValueError(
            "this is a single step, and the first one changes the topology: train for more epochs"
        )


def _all_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _epochs(count: int) -> Any:
    """`range(count)` with a progress bar, on a terminal only."""
    from tqdm import tqdm

    return tqdm(range(count), desc="epochs", unit="epoch", disable=not sys.stderr.isatty(), leave=False)


def train(config: Digits) -> Path:
    """Train both, print the table, write `report.json` and `report.png`; returns their folder."""
    from rigl import report

    _check(config)
    report.prepare(config.out)
    torch.set_num_threads(config.threads or _all_cores())
    x, y, x_test, y_test = load()
    models = build(config)
    per_epoch = len(y) // config.batch_size
    steps = config.epochs * per_epoch
    dense, sparse = (_contestant(model, config, steps) for model in models)
    method = getattr(rigl, _METHODS[config.method])
    sparse.updater = method(
        sparse.model,
        sparse.optimizer,
        t_end=max(1, round(0.75 * steps)),
        delta_t=config.delta_t,
        alpha=config.alpha,
        seed=config.seed,
    )
    before = _connections(sparse.model)
    print(rigl.summary(sparse.model))
    order = torch.Generator().manual_seed(config.seed)
    bar = _epochs(config.epochs)
    for epoch in bar:
        shuffled = torch.randperm(len(y), generator=order)[: per_epoch * config.batch_size]
        batches = [(x[i], y[i]) for i in shuffled.split(config.batch_size)]
        for side in (dense, sparse):
            side.train_epoch(batches)
        scores = [100 * side.evaluate(x_test, y_test) for side in (dense, sparse)]
        line = f"test accuracy: dense {scores[0]:.1f} %, sparse {scores[1]:.1f} %"
        bar.set_postfix_str(line)
        if bar.disable and (epoch + 1) % max(1, config.epochs // 5) == 0:
            print(f"epoch {epoch + 1:3d} of {config.epochs}   {line}", flush=True)
    results = {"dense": dense.result(), "sparse": sparse.result()}
    weights = [count_weights(side.model) for side in (dense, sparse)]
    flops = training_flops(weights[0], weights[1], config.method, config.delta_t)
    for name, relative in (("dense", 1.0), ("sparse", flops)):
        results[name]["training_flops"] = relative
        results[name]["training_flops_per_image"] = relative * 6 * weights[0]
    pattern = None
    if before is not None:
        pattern = {
            "title": "Connections per input pixel",
            "before": before.tolist(),
            "after": _connections(sparse.model).tolist(),  # type: ignore[union-attr]
        }
    return report.write(config.out, "digits", asdict(config), results, pattern, _METHODS[config.method])
